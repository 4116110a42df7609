"""`opt-lm verify`: whether two checkpoints, or two backends, compute the same thing."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_cli import console
from opt_cli.backends import load_backend
from opt_cli.devices import on_mesh

if TYPE_CHECKING:
    from conversion import Report
    from conversion.verify import Side


@on_mesh
def verify(
    a: Annotated[
        str, typer.Argument(help='The reference: a folder, hub id or "mini".', metavar="MODEL")
    ],
    b: Annotated[
        str,
        typer.Argument(
            help="What to compare with it; the same for several backends.", metavar="MODEL"
        ),
    ],
    backends: Annotated[
        str, typer.Option(help="Backends, separated by commas: torch,tf,flax.", metavar="NAME")
    ] = "torch",
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            help="Text to compare on; may be repeated (default: three short ones).", metavar="TEXT"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "-n", help="Greedy tokens to compare.", metavar="N", min=1
        ),
    ] = 16,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest difference of logits, relative to the largest logit (default: 1e-4).",
            metavar="X",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
    *,
    devices: Any,
) -> None:
    """Compare two models on the same prompts: logits, then greedy tokens.

    Both are computed in float32, one after the other. Exits with 0 if they are equal and 1 if not.
    """
    from conversion.verify import TOLERANCE, verify

    names = [name.strip() for name in backends.split(",") if name.strip()]
    for name in names:
        load_backend(name)  # without its log lines
    with console.progress("comparing") as progress:

        def report_progress(side: "Side", done: int, total: int) -> None:
            progress(done, total, f"loading {side}")

        report = verify(
            a,
            b,
            backends=names,
            prompts=prompt or None,
            max_new_tokens=max_new_tokens,
            tolerance=TOLERANCE if tolerance is None else tolerance,
            progress=report_progress,
            mesh=devices,
        )
    if json:
        summary = {"equal": report.equal, "max_difference": report.max_difference}
        console.print_json(summary | asdict(report))
    else:
        _print(report)
    if not report.equal:
        raise typer.Exit(console.EXIT_DIFFERENT)


def _print(report: "Report") -> None:
    from rich.table import Table
    from rich.text import Text

    console.stdout.print(Text(f"reference  {report.reference}"), soft_wrap=True)
    for side in dict.fromkeys(row.side for row in report.differences):
        console.stdout.print(Text(f"compared   {side}\n"), soft_wrap=True)
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=30)
        table.add_column("max |logit|", justify="right", no_wrap=True)
        table.add_column("max |diff|", justify="right", no_wrap=True)
        table.add_column("greedy tokens", justify="right", no_wrap=True)
        for row in report.differences:
            if row.side != side:
                continue
            first = row.first_difference
            table.add_row(
                Text(repr(row.prompt)),
                f"{row.max_logit:.4g}",
                f"{row.max_difference:.2e}",
                f"{row.tokens} agree" if first is None else f"token {first + 1} differs",
                style=None if report.agrees(row) else "red",
            )
        console.stdout.print(table)
        console.stdout.print()
    for note in report.notes:
        console.stdout.print(Text(f"note: {note}"), soft_wrap=True)
    verdict = "equal" if report.equal else "different"
    console.stdout.print(
        f"{verdict}: largest difference {report.max_difference:.2e}, allowed {report.tolerance:g} "
        "of the largest logit",
        style="bold green" if report.equal else "bold red",
        soft_wrap=True,
    )
