"""`opt-lm plot`: a run's loss and learning rate as a picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from opt_cli import console
from opt_core.errors import ConfigError, TrainingError


def plot(
    run: Annotated[Path, typer.Argument(help="Folder of a run of `opt-lm train`.", metavar="RUN")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="Picture to write, .png, .svg or .pdf (default: RUN/loss.svg).", metavar="FILE"
        ),
    ] = None,
) -> None:
    """Draw loss and learning rate over the steps of a run."""
    from opt_core.training.run_folder import METRICS_FILE, read_metrics

    if not run.is_dir():
        raise TrainingError(f"{run}: no such folder")
    records = read_metrics(run)
    steps = [r for r in records if r.get("loss") is not None]
    if not steps:
        raise TrainingError(f"{run / METRICS_FILE}: expected steps of a run, found none")
    path = out or run / "loss.svg"
    write_picture(path, lambda figure: _draw(figure, run.resolve().name, steps, records))
    console.write(f"{path}\n")


def write_picture(
    path: Path, draw: Callable[[Any], None], size: tuple[float, float] = (7, 4.5)
) -> None:
    """Writes a picture, whole or not at all.

    Args:
        path: Where; its name says which format.
        draw: Is given a figure of matplotlib's.
        size: Width and height in inches.

    Raises:
        ConfigError: The name is of no known format, or matplotlib is not there.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"picture: expected a name in .png, .svg or .pdf, received {str(path)!r}")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a picture needs matplotlib: pip install 'opt-lm[plots]'") from None
    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    part = path.with_name(f".{path.name}{path.suffix}")
    try:
        figure.savefig(part, dpi=150)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _draw(
    figure: Any, name: str, steps: list[dict[str, Any]], records: list[dict[str, Any]]
) -> None:
    """The loss above, with its mean over a fiftieth of the run; the learning rate below."""
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    x, losses = [r["step"] for r in steps], [r["loss"] for r in steps]
    window = max(1, len(x) // 50)
    if window > 1:
        upper.plot(x, losses, color="C0", alpha=0.25, linewidth=0.8)
        ends = range(window, len(x) + 1)
        means = [sum(losses[end - window : end]) / window for end in ends]
        upper.plot(x[window - 1 :], means, color="C0", label=f"training, mean of {window} steps")
    else:
        upper.plot(x, losses, color="C0", label="training")
    validations = [r for r in records if r.get("eval_loss") is not None]
    if validations:
        places = [r["step"] for r in validations]
        upper.plot(
            places, [r["eval_loss"] for r in validations], "o-", color="C1", markersize=3,
            label="validation",
        )  # fmt: skip
    skipped = [r["step"] for r in records if r.get("skipped")]
    if skipped:
        upper.plot(skipped, [max(losses)] * len(skipped), "x", color="C3", label="skipped")
    upper.set(ylabel="loss (nats)", title=name)
    upper.legend()
    lower.plot(x, [r["learning_rate"] for r in steps], color="C2")
    lower.set(xlabel="step", ylabel="learning rate")
    lower.ticklabel_format(axis="y", scilimits=(0, 0))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
