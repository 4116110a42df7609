"""`opt-lm plan`: which mesh a model needs, and what each device then holds."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_cli import console
from opt_core.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from opt_core.planning import Plan

TASKS = ("train", "generate")


def plan(
    model: Annotated[
        str, typer.Argument(help='A size such as "opt-13b", a folder or hub id.', metavar="MODEL")
    ],
    devices: Annotated[int, typer.Option(help="Devices there are.", metavar="N")],
    memory: Annotated[str, typer.Option(help="Memory of each, such as 80GB.", metavar="SIZE")],
    task: Annotated[str, typer.Option(help="train or generate.", metavar="NAME")] = "train",
    mesh: Annotated[
        str | None,
        typer.Option(help="This mesh, not the best: data=N,fsdp=N,model=N.", metavar="SIZE"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of weights, gradients and moments (default: float32 to train, else bfloat16).",
            metavar="NAME",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            help="Rows of a step, or prompts at once (default: one per device, or 8).", metavar="N"
        ),
    ] = None,
    sequence_length: Annotated[
        int, typer.Option(help="Tokens of a row, new ones included.", metavar="N")
    ] = 2048,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say which mesh a model fits on, and what each device holds.

    opt-lm plan opt-13b --devices 8 --memory 80GB --task train

    The figures are arithmetic: weights, moments and cache are exact, the rest is what a step keeps
    at most. Nothing is loaded.
    """
    from opt_core.mesh import check_count, parse_mesh
    from opt_core.planning import Work, suggest
    from opt_core.planning import plan as make_plan

    if task not in TASKS:
        raise ConfigError(f"--task: expected {' or '.join(TASKS)}, received {task!r}")
    if devices < 1:
        raise ConfigError(f"--devices: expected an integer of at least 1, received {devices}")
    trains = task == "train"
    rows = batch_size if batch_size is not None else devices if trains else 8
    for name, value in (("--batch-size", rows), ("--sequence-length", sequence_length)):
        if value < 1:
            raise ConfigError(f"{name}: expected an integer of at least 1, received {value}")
    room = _bytes(memory)
    config = _config(model)
    work = Work(
        "train" if trains else "generate",
        dtype or ("float32" if trains else "bfloat16"), rows, sequence_length,
    )  # fmt: skip
    if mesh is None:
        found = suggest(config, work, devices, room)
    else:
        sizes = parse_mesh(mesh)
        check_count(sizes, devices, is_exact=True)
        found = make_plan(config, work, sizes)
    if json:
        console.print_json(_values(found, room))
    elif found is None:
        console.write(
            f"{model}: no mesh of {devices} devices of {memory} fits {task} with {rows} rows of "
            f"{sequence_length} tokens in {work.dtype}\n"
        )
    else:
        _print(found, room)
    if found is None or not found.fits(room):
        raise typer.Exit(console.EXIT_DIFFERENT)


def _config(name: str) -> Any:
    from opt_core import OPTConfig
    from opt_core.hub import resolve
    from opt_core.presets import PRESETS

    if name in PRESETS:
        return OPTConfig.from_preset(name)
    folder = resolve(name)
    return OPTConfig.from_pretrained(folder if folder.is_dir() else folder.parent)


def _bytes(memory: str) -> int:
    from opt_core.checkpoints.save import parse_size

    try:
        return parse_size(memory)
    except CheckpointError:
        raise ConfigError(
            f"--memory: expected a size such as 80GB or 16GiB, received {memory!r}"
        ) from None


def _values(found: "Plan | None", room: int) -> dict[str, Any]:
    if found is None:
        return {"mesh": None, "fits": False}
    more = {"total": found.total, "memory": room, "fits": found.fits(room)}
    return asdict(found) | more


def _print(found: "Plan", room: int) -> None:
    names = ("weights", "moments", "cache", "gradients", "gathered", "activations", "logits")
    rows = [(name, console.size(getattr(found, name))) for name in names if getattr(found, name)]
    rows += [("in all", console.size(found.total)), ("of", console.size(room))]
    console.table(("per device", "size"), rows)
    text = ",".join(f"{name}={size}" for name, size in found.mesh.items())
    verdict = "" if found.fits(room) else " does not fit"
    console.write(f"\n--mesh {text}{verdict}\n")
