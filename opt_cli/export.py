"""`opt-lm export`: a model as a program for its framework."""

from pathlib import Path
from typing import Annotated, Any

import typer

from opt_cli import console
from opt_cli.backends import AUTO, Backend, load_backend
from opt_cli.generate import resolve_settings
from opt_core.errors import ConfigError

DEFAULT_MAX_PROMPT = 64


def export(
    model: Annotated[str, typer.Argument(help='Folder, hub id, or "mini".', metavar="MODEL")],
    destination: Annotated[
        Path,
        typer.Argument(
            help="torch: a file (.pt2); tf: a folder or a file (.tflite); flax: a folder.",
            metavar="FILE",
        ),
    ],
    backend: Backend = AUTO,
    adapter: Annotated[
        str | None, typer.Option(help="PEFT adapter to merge: folder or hub id.", metavar="MODEL")
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16, float16; auto: as stored.", metavar="NAME")
    ] = "float32",
    max_prompt: Annotated[
        int | None,
        typer.Option(
            help=f"tf, flax: most tokens of a prompt (default: {DEFAULT_MAX_PROMPT}).", metavar="N"
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            help="tf, flax: most tokens to write (default: as opt-lm generate).",
            metavar="N",
        ),
    ] = None,
    do_sample: Annotated[
        bool | None,
        typer.Option(
            "--do-sample/--greedy",
            help="tf, flax: draw tokens, or take the likeliest (default: the model's own).",
            show_default=False,
        ),
    ] = None,
    num_beams: Annotated[
        int | None,
        typer.Option(help="tf, flax: beams to keep; above 1: beam search.", metavar="N"),
    ] = None,
) -> None:
    """Write a model as a program for its framework.

    torch: `torch.export` of the forward pass. tf: a SavedModel for TensorFlow Serving, or LiteRT.
    flax: StableHLO of `jax.export`, with the weights beside it. tf and flax export generation too,
    with the settings given here and those of the model's generation_config.json.
    """
    given = {"max_new_tokens": max_new_tokens, "do_sample": do_sample, "num_beams": num_beams}
    given = {name: value for name, value in given.items() if value is not None}
    if backend == "torch" and (given or max_prompt is not None):
        name = console.option(next(iter(given), "max_prompt"))
        raise ConfigError(f"{name} is for tf and flax; torch exports the forward pass alone")
    made, tokenizer = _load(model, adapter, revision, backend, dtype)
    with console.progress(f"exporting {model}"):
        if backend == "torch":
            from opt_torch.export import export_program

            export_program(made, destination)
        else:
            settings = resolve_settings(made.generation_config, given)
            write = _writer(backend, destination)
            longest = DEFAULT_MAX_PROMPT if max_prompt is None else max_prompt
            write(made, destination, longest, settings, tokenizer)
    console.write(f"{destination}: {model} for {backend}, {dtype}\n")


def _load(
    model: str, adapter: str | None, revision: str | None, backend: str, dtype: str
) -> tuple[Any, Any]:
    from opt_core import OPTTokenizer
    from opt_core.adapters.folders import tokenizer_folder
    from opt_core.hub import resolve

    path = resolve(model, revision=revision)
    tokenizer = None
    if backend != "torch":
        tokenizer = OPTTokenizer.from_pretrained(tokenizer_folder(path, adapter))
    with console.progress(f"loading {model}") as progress:
        made = load_backend(backend).from_pretrained(
            path, dtype=dtype, progress=progress, adapter=adapter
        )
    return made, tokenizer


def _writer(backend: str, destination: Path) -> Any:
    if backend == "flax":
        from opt_flax.export import export_stablehlo

        return export_stablehlo
    from opt_tf.export import export_saved_model, export_tflite

    return export_tflite if destination.suffix == ".tflite" else export_saved_model
