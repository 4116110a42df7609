"""The picture of `opt-lm eval paper`."""

from typing import TYPE_CHECKING, Any

from opt_core.errors import DataError

if TYPE_CHECKING:
    from opt_core.evaluation.paper import PaperResult


def draw(figure: Any, result: "PaperResult") -> None:
    """The tasks as bars with their standard errors, beside chance and published figures.

    Args:
        figure: A figure of matplotlib's.
        result: What to draw.

    Raises:
        DataError: There are no tasks in it.
    """
    from opt_core.evaluation.paper import TASKS, published

    if not result.tasks:
        raise DataError("--plot: no task was measured")
    axes = figure.subplots()
    for place, one in enumerate(result.tasks):
        others = published(one.task, result.size, one.shots)
        metric = others.metric if others else "acc"
        value = 100 * getattr(one, metric)
        error = (value * (100 - value) / max(1, one.items - 1)) ** 0.5
        axes.barh(place, value, xerr=error, color="C0", height=0.6, ecolor="0.3", capsize=2)
        if one.chance is not None:
            axes.plot([100 * one.chance] * 2, [place - 0.42, place + 0.42], color="0.2", ls=":")
        if others:
            axes.plot(others.percent, place, "D", color="C1", markersize=6)
    for name, style in (
        ("this model ± standard error", {"color": "C0", "linewidth": 6}),
        ("guessing", {"color": "0.2", "linestyle": ":"}),
        (f"published, {result.size}", {"color": "C1", "marker": "D", "linestyle": ""}),
    ):
        if result.size or "published" not in name:
            axes.plot([], [], label=name, **style)
    axes.set_yticks(range(len(result.tasks)), [TASKS[one.task].title for one in result.tasks])
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="accuracy (%)")
    shots = result.tasks[0].shots
    axes.set_title(f"{result.model}, {f'{shots}-shot' if shots else 'zero-shot'}")
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
