"""Progress of a training run: a bar on a terminal, lines elsewhere."""

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from opt_cli import console
from opt_cli.training.trackers import OnRecord

EVERY_SECONDS = 10.0
"""Between two lines where stderr is no terminal."""


@contextmanager
def training_progress(
    total: int, start: int, trackers: Iterable[AbstractContextManager[OnRecord]] = ()
) -> Iterator[OnRecord]:
    """Shows a run's records on stderr, and hands them to whatever else follows the run.

    Args:
        total: Steps in all.
        start: Steps done already.
        trackers: Such as `opt_cli.training.trackers` has.

    Yields:
        A function to call with each record.
    """
    with ExitStack() as stack:
        watching = [stack.enter_context(tracker) for tracker in trackers]
        watching.append(stack.enter_context(_progress_bar(total, start)))

        def on_record(record: dict[str, Any]) -> None:
            for watch in watching:
                watch(record)

        yield on_record


def peak_memory() -> int:
    """The most memory this process has had, in bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


@contextmanager
def _progress_bar(total: int, start: int) -> Iterator[OnRecord]:
    if console.is_muted():
        yield lambda record: None
        return
    if not console.stderr.is_terminal:
        yield _progress_lines(total)
        return
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    what, bar_itself, figures = console.bar_columns("figures")
    done, left = MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    columns = (bar_itself, done, left, figures) if console.is_narrow() else (
        what, bar_itself, done, left, figures
    )  # fmt: skip
    with Progress(*columns, console=console.stderr) as bar:
        task = bar.add_task("training", total=total, completed=start, figures="")

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
    """As many as a terminal has room for beside its bar; all of them elsewhere."""
    width = console.stderr.width if console.stderr.is_terminal else 100
    if width < console.NARROW:
        return f"loss {record['loss']:.3f}"
    figures = f"loss {record['loss']:.4f}, {record['tokens_per_s']:,.0f} tokens/s"
    return figures if width < 100 else f"{figures}, {console.size(peak_memory())}"


def _event_line(record: dict[str, Any]) -> str:
    if record.get("skipped"):
        return f"step {record['step']}: loss or gradient not finite; skipped"
    loss = "not finite" if record["eval_loss"] is None else f"{record['eval_loss']:.4f}"
    best = ", the best so far" if record["best"] else ""
    return f"step {record['step']}: validation loss {loss}{best}"
