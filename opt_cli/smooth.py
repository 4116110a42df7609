"""`opt-lm smooth`: a copy of a model whose activations lose less when they are rounded."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from opt_cli import console


def smooth(
    source: Annotated[
        str,
        typer.Argument(
            help='Folder, weight file, index of shards, hub id, or "mini".', metavar="MODEL"
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    text: Annotated[
        Path, typer.Option(help="A text such as the model will see, UTF-8.", metavar="FILE")
    ],
    alpha: Annotated[
        float, typer.Option(help="How much of the range goes to the weights, 0 to 1.", metavar="X")
    ] = 0.5,
    rows: Annotated[
        int, typer.Option(help="Rows of the text to look at.", min=1, metavar="N")
    ] = 32,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=1, metavar="N")] = 256,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Move outliers from the activations into the weights (SmoothQuant).

    The copy computes what the model does, bit for bit; loaded into PyTorch with --quantize int8,
    whose activations are rounded too, it stays nearer to that where some of them are much larger
    than others.

    Rows are taken evenly from the text. No framework is needed.
    """
    from conversion.smoothquant import calibration_rows, smooth
    from opt_core import OPTTokenizer
    from opt_core.data import read_text
    from opt_core.hub import resolve

    tokenizer = OPTTokenizer.from_pretrained(resolve(source, convertible=True, revision=revision))
    ids = calibration_rows(tokenizer.encode(read_text(text)), rows, length)
    with console.progress("measuring", unit="layers") as progress:
        done = smooth(
            source,
            destination,
            ids,
            alpha,
            progress=progress,
            writing=lambda done, total: progress(done, total, "writing", None),
            revision=revision,
        )
    if json:
        console.print_json(asdict(done) | {"path": str(done.path)})
        return
    before, after = done.outliers
    looked, changed = done.inputs
    console.write(
        f"{done.path}: {changed} of {looked} layers' inputs smoothed; the largest input was "
        f"{before:.1f} times the median one, is {after:.1f} times\n"
    )
    for note in done.notes:
        console.note(f"note: {note}")
