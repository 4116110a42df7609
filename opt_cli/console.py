"""The console that commands share: errors of one line, quiet ends, progress only on a terminal."""

import io
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from opt_core.errors import InputError, OPTError

NARROW = 80
"""Columns of a terminal."""

EXIT_DIFFERENT = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 128 + 2
EXIT_BROKEN_PIPE = 128 + 13

# What a terminal would act on instead of showing: all control characters but tab and line feed.
_CONTROLS = {c: 0x2400 + c for c in range(0x20) if chr(c) not in "\t\n"} | dict.fromkeys(
    range(0x7F, 0xA0), 0xFFFD
)


_muted: list[bool] = []


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich would end the process itself, with exit code 1


stderr = _Console(stderr=True, highlight=False)
stdout = _Console(highlight=False)


class _BrokenPipe(Exception):
    """Stands for BrokenPipeError on its way through typer, which would make it exit code 1."""


class PipeGroup(TyperGroup):
    """A group of commands whose broken pipes reach `run`."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the subcommand."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise _BrokenPipe from None


def run(app: typer.Typer, arguments: list[str] | None) -> int:
    """Runs an application and turns whatever ends it into an exit code.

    Args:
        app: The application.
        arguments: Command-line arguments; None takes those of the process.

    Returns:
        The exit code. A user's error has been told in one line on stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            stream.reconfigure(errors="backslashreplace")
    if not stderr.is_terminal:  # or a download would fill a log with its bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        code = app(args=arguments, prog_name="opt-lm", standalone_mode=False)
        sys.stdout.flush()
    except (OPTError, typer.TyperException) as error:
        message = str(error) if isinstance(error, OPTError) else error.format_message()
        return _fail(message)
    except (_BrokenPipe, BrokenPipeError):
        # What is still buffered has nowhere to go; the interpreter must not try again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    return code or 0


def _fail(message: str) -> int:
    line = " ".join(message.split()).translate(_CONTROLS)
    stderr.print("error:", style="bold red", end=" ")
    stderr.out(line)
    return EXIT_USER_ERROR


def write(text: str, style: str | None = None) -> None:
    """Writes text to stdout as it is and at once; a terminal gets no control characters from it.

    Args:
        text: What a model or a user wrote: never markup.
        style: How a terminal shows it, in rich's words, such as "bold".
    """
    if _muted:
        return
    if stdout.is_terminal:
        text = text.translate(_CONTROLS)
    if style is not None and stdout.is_terminal:
        stdout.out(text, style=style, end="")
    else:
        sys.stdout.write(text)
    sys.stdout.flush()


def ask(question: str, refusal: str) -> str:
    """Asks for a line of text, on stderr, where somebody can answer.

    Args:
        question: What is asked.
        refusal: What to say where nobody does.

    Raises:
        InputError: Nobody answers.
    """
    if not stderr.is_terminal:
        raise InputError(refusal)
    try:
        return stderr.input(question, markup=False)
    except BaseException as error:
        stderr.out("")  # the line of the question has no end yet
        if isinstance(error, EOFError):
            raise InputError(refusal) from None
        raise


def note(text: str) -> None:
    """Writes one line about the run itself to stderr."""
    if not _muted:
        stderr.out(text, style="dim")


@contextmanager
def notices(start: str) -> Iterator[None]:
    """Tells of what the library warns of in one line each, at the end of the block.

    Args:
        start: How the warnings begin that are told of; others are shown as always.
    """
    told: list[str] = []
    with warnings.catch_warnings():
        show = warnings.showwarning

        def keep(message: Any, *place: Any, **output: Any) -> None:
            if str(message).startswith(start):
                told.append(str(message))
            else:
                show(message, *place, **output)

        warnings.showwarning = keep
        yield
    for line in told:
        note(line)


def mute() -> None:
    """Silences all but errors, in a process whose words another one says."""
    _muted.append(True)
    stdout.quiet = True


def is_muted() -> bool:
    """Whether this process is silent."""
    return bool(_muted)


def print_json(values: dict[str, Any]) -> None:
    """Writes one JSON object to stdout, on one line."""
    if not _muted:
        sys.stdout.write(json.dumps(values) + "\n")


def option(name: str) -> str:
    """The command line's spelling of a setting: "top_p" is --top-p."""
    return "--" + name.replace("_", "-")


def size(nbytes: float) -> str:
    """Bytes for a reader: 1536 is "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 1024:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


def table(header: Sequence[str] | None, rows: Sequence[Sequence[Any]]) -> None:
    """Writes a table to stdout: names on the left, numbers on the right.

    Args:
        header: Titles of the columns, or None.
        rows: Texts and numbers; floats are shown with four figures.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, header_style="bold", show_header=header is not None)
    for i in range(max(map(len, rows), default=0)):
        is_number = i > 0 and all(_is_number(row[i]) for row in rows)
        title = Text(header[i]) if header else ""
        made.add_column(title, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        made.add_row(*(Text(_format_cell(value)) for value in row))
    stdout.print(made)


def _is_number(value: Any) -> bool:
    """Numbers, also those that are written already, or left out."""
    written = isinstance(value, str) and re.fullmatch(r"-?[\d,.]+\*?|\N{EN DASH}", value)
    return isinstance(value, int | float) or bool(written)


def _format_cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


@contextmanager
def progress(what: str, unit: str | None = None) -> Iterator[Callable[..., None]]:
    """Shows on stderr that something is under way, if stderr is a terminal.

    Args:
        what: What is under way, such as "loading mini".
        unit: What is counted, such as "rows"; None: bytes.

    Yields:
        A function to call with (bytes done, bytes in all) and, where they change, what is under way
        and its unit. Until it is called, the bar only pulses.
    """
    if is_muted() or not stderr.is_terminal:
        yield lambda *_: None
        return
    from rich.filesize import decimal
    from rich.progress import Progress, SpinnerColumn

    columns = (SpinnerColumn(), *bar_columns("amount"))
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task(what, total=None, amount="")
        now, start = what, time.monotonic()

        def update(done: int, total: int, what: str = what, unit: str | None = unit) -> None:
            nonlocal now, start
            if what != now:
                now, start = what, time.monotonic()
            rate = done / max(1e-3, time.monotonic() - start)
            if unit is None:
                amount = f"{decimal(done)} of {decimal(total)}, {decimal(int(rate))}/s"
            else:
                amount = f"{done} of {total} {unit}, {rate:.3g}/s"
            if is_narrow():
                amount = f"{100 * done // max(1, total)}%"
            bar.update(task, completed=done, total=total, description=what, amount=amount)

        yield update


def is_narrow() -> bool:
    """Whether a line of the terminal has no room for a bar and all its figures."""
    return stderr.width < NARROW


def bar_columns(figures: str) -> tuple[Any, ...]:
    """Columns of a progress bar: what is under way, the bar, figures.

    The bar keeps its place where a terminal is narrow: what does not fit is cut off at its right.

    Args:
        figures: Field of the task that holds the figures.
    """
    from rich.progress import BarColumn, TextColumn
    from rich.table import Column

    width = max(8, min(40, stderr.width // 5))
    return (
        TextColumn(
            "{task.description}",
            markup=False,
            table_column=Column(max_width=stderr.width // 3, no_wrap=True, overflow="ellipsis"),
        ),
        BarColumn(bar_width=width, table_column=Column(min_width=width, no_wrap=True)),
        TextColumn(
            f"{{task.fields[{figures}]}}",
            markup=False,
            table_column=Column(no_wrap=True, overflow="ellipsis"),
        ),
    )
