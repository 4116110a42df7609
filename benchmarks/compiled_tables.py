"""Tables of compiled programs, for a terminal and for the page docs/devices.md."""

import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from benchmarks.compiled_programs import Row, Target

GIB = 2**30
HEADINGS = (
    "model", "devices", "data x fsdp x model", "program", "arguments", "temporaries", "peak", "of",
)  # fmt: skip


def cells(target: "Target", row: "Row") -> tuple[str, ...]:
    """A row of the table."""
    head = (row.size, f"{row.devices} {row.device}", row.mesh, row.program)
    of = f"{row.memory / GIB:.0f}"
    if row.error:
        return (*head, "-", "-", "-", of, row.error.partition("\n")[0])
    sizes = tuple(f"{value / GIB:.2f}" for value in (row.arguments, row.temporaries, row.peak))
    return (*head, *sizes, of, *target.cells(row))


def talk(row: "Row") -> str:
    """The collectives in letters."""
    short = {"all-reduce": "AR", "all-gather": "AG", "reduce-scatter": "RS", "all-to-all": "A2A",
             "collective-permute": "CP"}  # fmt: skip
    found = (f"{count} {short[kind]}" for kind, count in row.collectives.items())
    return ", ".join(found) or "none"


def attention_cells(sizes: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of attention's temporaries."""
    return [
        (name, f"{ours / 2**20:.1f}", f"{plain / 2**20:.1f}", f"{ours / plain:.4f}")
        for name, (ours, plain) in sizes.items()
    ]


def show(target: "Target", rows: list[Any], sizes: dict[str, Any], markdown: bool) -> None:
    """Prints the tables."""
    kinds = ("attention of", "kernel, MiB", "plain, MiB", "ratio")
    tables = (
        ((*HEADINGS, *target.headings), [cells(target, row) for row in rows]),
        (kinds, attention_cells(sizes)),
    )
    for headings, lines in tables:
        if markdown:
            print(markdown_row(headings) + "\n" + "|---" * len(headings) + "|")
            print("\n".join(map(markdown_row, lines)) + "\n")
            continue
        table = Table(*headings)
        for line in lines:
            table.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(target.legend)


def markdown_row(texts: tuple[str, ...]) -> str:
    """A line of a table in Markdown."""
    return f"| {' | '.join(texts)} |"
