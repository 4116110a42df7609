"""`opt-lm convert`: a checkpoint in any format, written in any other."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from opt_cli import console


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help='Folder, weight file, index of shards, hub id, or "mini".', metavar="MODEL"
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="A new folder.", metavar="DIR")],
    to: Annotated[
        str,
        typer.Option(
            help="safetensors, torch-bin, tf-h5, flax-msgpack, metaseq or keras-hub; gptq with "
            "--quantize.",
            metavar="NAME",
        ),
    ] = "safetensors",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type to store: float32, float16, bfloat16 or float64 (default: as it is).",
            metavar="NAME",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8 or int4: small weights, in the files of compressed-tensors, or --to gptq.",
            metavar="NAME",
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(help="Most bytes of tensors per file.", metavar="SIZE")
    ] = "5GB",
    prefix: Annotated[
        str,
        typer.Option(
            help='Take the part of a larger model whose names begin so ("language_model." of '
            "BLIP-2).",
            metavar="NAME",
        ),
    ] = "",
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter to merge: folder or hub id.", metavar="MODEL")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Write a checkpoint in another format, for another framework.

    The source's format is found from its files. The new folder appears when it is complete.

    No framework is needed, and no more memory than two tensors take.
    """
    from conversion import convert

    with console.progress(f"converting {source}") as progress:
        done = convert(
            source,
            destination,
            to=to,
            dtype=dtype,
            max_shard_size=max_shard_size,
            progress=progress,
            prefix=prefix,
            adapter=adapter,
            quantize=quantize,
            revision=revision,
        )
    if json:
        console.print_json(asdict(done) | {"path": str(done.path)})
        return
    count = "1 file" if len(done.files) == 1 else f"{len(done.files)} files"
    size = console.size(sum(done.files.values()))
    console.write(f"{done.path}: {done.format} from {done.source_format}, {count}, {size}\n")
    for note in done.notes:
        console.note(f"note: {note}")
