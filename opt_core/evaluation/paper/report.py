"""The findings of an evaluation, as rows of a table and as markdown for a model card."""

from dataclasses import dataclass, field

from opt_core.evaluation.bias import BiasResult
from opt_core.evaluation.paper.evaluate import TaskResult
from opt_core.evaluation.paper.figures import published
from opt_core.evaluation.paper.tasks import TASKS
from opt_core.evaluation.toxicity import ToxicityResult

HEADER = ("task", "rows", "acc %", "±", "acc_norm %", "f1 %", "chance %", "published %")
BLANK = "\N{EN DASH}"

OTHERS = {
    "crows_pairs": "CrowS-Pairs",
    "stereoset": "StereoSet",
    "real_toxicity_prompts": "RealToxicityPrompts",
}
"""The paper's other measurements, besides the tasks: names and titles."""
TITLES = {**{name: task.title for name, task in TASKS.items()}, **OTHERS}
"""The title of everything that is measured, by its name."""


@dataclass
class PaperResult:
    """The paper's evaluation of one model, filled task by task.

    Attributes:
        model: What the model is called.
        size: The official size whose figures are shown beside it; None: none.
        tasks: What was measured of the 16 tasks.
        bias: CrowS-Pairs' and StereoSet's.
        toxicity: RealToxicityPrompts'; None: not measured.
        missing: Tasks whose files were not there, and why.
    """

    model: str
    size: str | None = None
    tasks: list[TaskResult] = field(default_factory=list[TaskResult])
    bias: list[BiasResult] = field(default_factory=list[BiasResult])
    toxicity: ToxicityResult | None = None
    missing: dict[str, str] = field(default_factory=dict[str, str])


def table_rows(result: PaperResult) -> list[tuple[str, ...]]:
    """The tasks as rows of `HEADER`; a star marks the metric of the published figure."""
    rows: list[tuple[str, ...]] = []
    for one in result.tasks:
        figure = published(one.task, result.size, one.shots)
        metric = figure.metric if figure else ""
        rows.append(
            (
                TASKS[one.task].title,
                str(one.items),
                _percent(one.acc, metric == "acc"),
                _percent(one.acc_error),
                _percent(one.acc_norm, metric == "acc_norm"),
                _percent(one.f1),
                _percent(one.chance),
                f"{figure.percent:.1f}" if figure else BLANK,
            )
        )
    return rows


def sources(result: PaperResult) -> list[str]:
    """Who published the figures of a table, each once."""
    figures = [published(one.task, result.size, one.shots) for one in result.tasks]
    return sorted({figure.source for figure in figures if figure})


def bias_rows(result: PaperResult) -> list[tuple[str, str, str]]:
    """Bias and toxicity: what was measured, the figure, and the paper's of that size."""
    rows: list[tuple[str, str, str]] = []
    for one in result.bias:
        if one.format == "crows-pairs":
            figure = published("crows_pairs", result.size)
            rows.append(_bias("CrowS-Pairs: stereotype likelier %", one.stereotype, figure))
            rows += [_bias(f"CrowS-Pairs: {k} %", v, None) for k, v in one.kinds.items()]
        else:
            figure = published("stereoset", result.size)
            rows.append(_bias("StereoSet: language model %", one.language_model, None))
            rows.append(_bias("StereoSet: stereotype likelier %", one.stereotype, None))
            rows.append(_bias("StereoSet: ICAT", one.icat, figure))
    if result.toxicity is not None:
        toxic = result.toxicity
        rows.append(("RealToxicityPrompts: prompts", str(toxic.prompts), BLANK))
        for kind, values in toxic.kinds.items():
            rows += [
                (f"RealToxicityPrompts, {kind} prompts: {name}", f"{value:.3f}", BLANK)
                for name, value in values.items()
            ]
    return rows


def results_markdown(result: PaperResult) -> str:
    """The results as a section's text for a model card: tables, and what they do not say.

    Headings in it are of the third level, so that it fits under one of the second
    (`opt_core.model_card.put_section`).
    """
    parts: list[str] = []
    if result.tasks:
        shots = {one.shots for one in result.tasks}
        before = ", ".join("zero-shot" if n == 0 else f"{n}-shot" for n in sorted(shots))
        beside = f", beside published figures of {result.size}" if result.size else ""
        parts += [
            "### Tasks",
            f"The tasks of the OPT paper, {before}, with the prompts of EleutherAI's harness"
            f"{beside}.",
            _markdown(HEADER, table_rows(result)),
        ]
        if named := sources(result):
            parts.append(
                f"\\* the metric of the published figure. Published by: {'; '.join(named)}."
            )
        one_in_many = (
            "A figure within two standard errors (±) of chance says that nothing was learnt."
        )
        parts.append(one_in_many)
    if rows := bias_rows(result):
        parts += ["### Bias and toxicity", _markdown(("measured", "this model", "OPT paper"), rows)]
        if result.bias:
            parts.append(
                "50 % of stereotypes is the ideal; pairs are compared by the likelihood of whole "
                "sentences. These sets know few groups, one language and one country's "
                "stereotypes: a good figure does not show that a model is fair."
            )
        if result.toxicity is not None:
            parts.append(
                f"Toxicity is what {result.toxicity.classifier} says of {result.toxicity.samples} "
                f"continuations of each prompt; other classifiers say otherwise."
            )
    measured = {one.task for one in result.tasks} | {one.format for one in result.bias}
    if result.toxicity is not None:
        measured.add("real-toxicity-prompts")
    missing = [TITLES[name] for name in TITLES if not measured & {name, name.replace("_", "-")}]
    if missing:
        parts.append(f"Not measured: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


def _bias(name: str, value: float | None, figure: object) -> tuple[str, str, str]:
    percent = getattr(figure, "percent", None)
    return (
        name,
        BLANK if value is None else f"{value:.1f}",
        BLANK if percent is None else f"{percent:.1f}",
    )


def _percent(value: float | None, is_compared: bool = False) -> str:
    return BLANK if value is None else f"{100 * value:.1f}" + "*" * is_compared


def _markdown(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["---:"] * (len(header) - 1)), *rows]
    cells = ([cell.replace("|", "\\|").replace("*", "\\*") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
