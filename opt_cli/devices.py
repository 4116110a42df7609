"""Devices and processes that a command spreads a model over: `--mesh` and what goes with it."""

import functools
import inspect
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, get_type_hints

import typer

from opt_cli import console
from opt_cli.backends import load_backend
from opt_core.errors import ConfigError
from opt_core.team import Team

Mesh = Annotated[
    str | None,
    typer.Option(
        "--mesh",
        help="Spread over devices, such as data=2,fsdp=2,model=2; torch: under torchrun.",
        metavar="SIZE",
    ),
]
"""The option of every command that can spread a model."""

Coordinator = Annotated[
    str | None,
    typer.Option(
        help='Flax on several hosts: HOST:PORT of the first process; "auto" on a pod or Slurm.',
        metavar="NAME",
    ),
]
Process = Annotated[
    str | None,
    typer.Option(help="With --coordinator: number of this process, as 0/2.", metavar="N"),
]


def on_mesh(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options `--mesh`, `--coordinator` and `--process`.

    Args:
        command: It has an argument `backend` (or `backends`, separated by commas), and its keyword
            argument `devices` receives the mesh, or None; the command runs in `spread`.
    """
    options = {"mesh": Mesh, "coordinator": Coordinator, "process": Process}
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "devices"]
    hints = get_type_hints(command, include_extras=True) | options

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        mesh, coordinator, process = (values.pop(name) for name in options)
        backend = str(values.get("backend") or values.get("backends"))
        if mesh is not None and backend not in ("torch", "flax"):
            raise ConfigError(
                f"--mesh: expected one backend, torch or flax, received {backend}; this command "
                "does not spread TensorFlow's models"
            )
        with spread(mesh, backend, coordinator, process) as (devices, _):
            command(**values, devices=devices)

    kind = inspect.Parameter.KEYWORD_ONLY
    given = [inspect.Parameter(name, kind, default=None) for name in options]
    parameters = [p.replace(annotation=hints[p.name], kind=kind) for p in (*own, *given)]
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


@contextmanager
def spread(
    mesh: str | None, backend: str, coordinator: str | None = None, process: str | None = None
) -> Iterator[tuple[Any, Team]]:
    """Makes the mesh that a command asks for; all but the first process are silent afterwards.

    Args:
        mesh: Sizes, as `opt_core.mesh.parse_mesh` reads them; None: no mesh.
        backend: "torch", "tf" or "flax".
        coordinator: Where JAX' processes meet, or "auto".
        process: Which of them this is, such as "0/2".

    Yields:
        The backend's mesh, or None; and the processes that share it.

    Raises:
        ConfigError: The sizes are none, do not fit the devices, or the backend cannot.
        TrainingError: A process was lost.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if coordinator is not None and backend != "flax":
        raise ConfigError(f"--coordinator is for the flax backend, received --backend {backend}")
    if mesh is None:
        if coordinator is not None or (started > 1 and backend == "torch"):
            count = "several" if coordinator else started
            raise ConfigError(
                f"{count} processes, and no --mesh to say how they share the work, such as "
                "--mesh data=2"
            )
        yield None, Team()
        return
    from conversion import backends
    from opt_core.mesh import parse_mesh

    sizes = parse_mesh(mesh)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost process is told of in one line
    if coordinator is not None:
        backends.load_backend(backend)  # of which nothing must look for devices yet
        import_module(f"opt_{backend}.sharding").connect(*_address(coordinator, process))
    load_backend(backend)
    sharding = import_module(f"opt_{backend}.sharding")
    made = sharding.make_mesh(**sizes)
    team: Team = sharding.team_of(made)
    if not team.is_first:
        console.mute()
    with sharding.told_of_losses(team):
        team.check_same("mesh", sizes)
        yield made, team
    sharding.disconnect()


def _address(coordinator: str, process: str | None) -> tuple[str | None, int, int]:
    """Where processes meet (None: the system knows), the number of this one and of all."""
    if coordinator == "auto":
        if process is not None:
            raise ConfigError('--process: with --coordinator "auto" the system knows it')
        return None, 0, 0
    match = re.fullmatch(r"(\d+)/(\d+)", process or "")
    if match is None or not int(match[1]) < int(match[2]):
        raise ConfigError(f"--process: expected a number and a count, as 0/2, received {process!r}")
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise ConfigError(f"--coordinator: expected HOST:PORT or auto, received {coordinator!r}")
    return coordinator, int(match[1]), int(match[2])
