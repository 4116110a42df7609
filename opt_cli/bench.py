"""`opt-lm bench`: how fast a model runs on this machine."""

from typing import Annotated, Any

import typer

from opt_cli import console
from opt_cli.backends import AUTO, Backend, load_backend
from opt_cli.devices import on_mesh
from opt_core.errors import ConfigError

TASKS = ("prefill", "decode", "batch")


@on_mesh
def bench(
    model: Annotated[str, typer.Argument(help='Folder, hub id, or "mini".', metavar="MODEL")],
    backend: Backend = AUTO,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="prefill, decode, batch, lookup, train or load; may be repeated (default: "
            f"{', '.join(TASKS)}).",
            metavar="NAME",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type of the weights: float32, bfloat16, float16.", metavar="NAME")
    ] = "float32",
    quantize: Annotated[
        str | None, typer.Option(help="int8 or int4 weights (default: none).", metavar="NAME")
    ] = None,
    reps: Annotated[
        int, typer.Option(help="Timed repetitions of each task.", metavar="N", min=1)
    ] = 3,
    max_new_tokens: Annotated[
        int,
        typer.Option("--max-new-tokens", "-n", help="Tokens to write.", metavar="N", min=1),
    ] = 64,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per task instead.")
    ] = False,
    *,
    devices: Any,
) -> None:
    """Measure tokens per second: of prompts, of new tokens, of training.

    prefill: 512 tokens; decode: new tokens one by one after 32; batch: for 8 prompts at once;
    lookup: with prompt lookup, for a text that repeats itself; train: 4 texts of 256, AdamW; all
    shorter where the model has no room. The first call, with all it sets up, is shown apart.
    """
    from opt_cli import speed
    from opt_core.quantization import check_scheme

    tasks = task or TASKS
    for name in tasks:
        if name not in speed.SHAPES:
            raise ConfigError(
                f"--task: expected one of {', '.join(speed.SHAPES)}, received {name!r}"
            )
    check_scheme(quantize)
    load_backend(backend)
    found = []
    for name in tasks:
        with console.progress(f"{name}: {model}"):
            result = speed.measure(
                backend, model, name, dtype, quantize, reps, max_new_tokens, devices
            )
        if json:
            console.print_json(result)
        found.append(result)
    if not json:
        columns = ("load_s", "first_s", "tok_s", "best", "rss_gib")
        header = ("task", "load, s", "first call, s", "tokens/s", "best", "peak memory, GiB")
        console.table(header, [(r["task"], *(r.get(c, "") for c in columns)) for r in found])
