"""`opt-lm quantize`: a small copy of a model, rounded with a text at hand."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from opt_cli import console

_HELD = 5  # the last fifth of the text is kept for measuring


def quantize(
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
    bits: Annotated[int, typer.Option(help="4, 8, or 3 (with --to gptq).", metavar="N")] = 4,
    to: Annotated[
        str,
        typer.Option(
            help="safetensors (compressed-tensors), or gptq for GPTQ's layout.", metavar="NAME"
        ),
    ] = "safetensors",
    rows: Annotated[
        int, typer.Option(help="Rows of the text to round by.", min=1, metavar="N")
    ] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=2, metavar="N")] = 256,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write a model with weights of 3, 4 or 8 bits, rounded by what they do to a text (GPTQ).

    It loses less than `convert --quantize`, which rounds to nearest, and takes as little room.
    Perplexity before and after is that of the last fifth of the text, which nothing is rounded by.

    No framework is needed.
    """
    from conversion.gptq import quantize
    from conversion.smoothquant import calibration_rows
    from opt_core import OPTTokenizer
    from opt_core.data import read_text
    from opt_core.hub import resolve

    tokenizer = OPTTokenizer.from_pretrained(resolve(source, convertible=True, revision=revision))
    ids = tokenizer.encode(read_text(text))
    kept = len(ids) // _HELD
    with console.progress("rounding", unit="layers") as progress:
        done = quantize(
            source,
            destination,
            calibration_rows(ids[: len(ids) - kept], rows, length),
            bits,
            calibration_rows(ids[len(ids) - kept :], rows, length),
            progress=progress,
            to=to,
            revision=revision,
        )
    if json:
        console.print_json(asdict(done) | {"path": str(done.path)})
        return
    size = console.size(sum(done.files.values()))
    measured = ""
    if done.perplexity is not None:
        before, after = done.perplexity
        measured = f"; perplexity {before:.4g} before, {after:.4g} after"
    console.write(f"{done.path}: {bits} bits, {size}{measured}\n")
    for note in done.notes:
        console.note(f"note: {note}")
