"""Progress of a training run: a bar on a terminal, lines elsewhere, TensorBoard."""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from opt_cli import console
from opt_core.errors import ConfigError

EVERY_SECONDS = 10.0
"""Between two lines where stderr is no terminal."""

OnRecord = Callable[[dict[str, Any]], None]


@contextmanager
def training_progress(total: int, start: int, tensorboard: Path | None) -> Iterator[OnRecord]:
    """Shows a run's records on stderr, and hands them to TensorBoard if that is asked for.

    Args:
        total: Steps in all.
        start: Steps done already.
        tensorboard: Folder for its event files; None: none.

    Yields:
        A function to call with each record.

    Raises:
        ConfigError: TensorBoard is asked for, and the library that writes for it is not there.
    """
    with _tensorboard_writer(tensorboard) as write, _progress_bar(total, start) as show:

        def on_record(record: dict[str, Any]) -> None:
            write(record)
            show(record)

        yield on_record


def peak_memory() -> int:
    """The most memory this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def _progress_bar(total: int, start: int) -> Iterator[OnRecord]:
    if not console.stderr.is_terminal:
        yield _progress_lines(total)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Remaining

    columns = (
        TextColumn("training"), BarColumn(), MofNCompleteColumn(), Remaining(),
        TextColumn("{task.fields[figures]}"),
    )  # fmt: skip
    with Progress(*columns, console=console.stderr) as bar:
        task = bar.add_task("", total=total, completed=start, figures="")

        def show(record: dict[str, Any]) -> None:
            if "eval_loss" in record or record.get("skipped"):
                bar.console.out(_event_line(record), style="dim")
            else:
                bar.update(task, completed=record["step"], figures=_figures(record))

        yield show


def _progress_lines(total: int) -> OnRecord:
    last = time.monotonic()

    def show(record: dict[str, Any]) -> None:
        nonlocal last
        if "eval_loss" in record or record.get("skipped"):
            console.note(_event_line(record))
        elif time.monotonic() - last >= EVERY_SECONDS or record["step"] == total:
            last = time.monotonic()
            console.note(f"step {record['step']} of {total}: {_figures(record)}")

    return show


def _figures(record: dict[str, Any]) -> str:
    return (
        f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s, "
        f"{console.size(peak_memory())}"
    )


def _event_line(record: dict[str, Any]) -> str:
    if record.get("skipped"):
        return f"step {record['step']}: loss or gradient not finite; skipped"
    loss = "not finite" if record["eval_loss"] is None else f"{record['eval_loss']:.4f}"
    best = ", the best so far" if record["best"] else ""
    return f"step {record['step']}: validation loss {loss}{best}"


@contextmanager
def _tensorboard_writer(folder: Path | None) -> Iterator[OnRecord]:
    if folder is None:
        yield lambda record: None
        return
    try:
        make = import_module("tensorboardX").SummaryWriter
    except ImportError:
        raise ConfigError(
            "--tensorboard needs a library: pip install 'opt-lm[tensorboard]'"
        ) from None
    writer: Any = None

    def write(record: dict[str, Any]) -> None:
        nonlocal writer
        # Not before the first record: it makes its folder, and a new run's must be empty.
        writer = writer or make(str(folder))
        for name, value in record.items():
            if name != "step" and isinstance(value, float):
                writer.add_scalar(name, value, record["step"])

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()
