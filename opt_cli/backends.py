"""Which framework a command computes with, and how it is loaded without its own chatter."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from opt_cli import console

FRAMEWORKS = {"torch": "torch", "tf": "tensorflow", "flax": "flax"}
"""The framework of each backend, the first choice first."""


AUTO = "auto"


def chosen(name: str) -> str:
    """The backend of a name; of "auto" the first whose framework is there.

    Which one that is, is said where it is not torch.
    """
    if name != AUTO:
        return name
    for backend, framework in FRAMEWORKS.items():
        if find_spec(framework) is not None:
            if backend != next(iter(FRAMEWORKS)):
                console.note(f"backend: {backend}; torch is not installed")
            return backend
    return "torch"  # loading it says what to install


Backend = Annotated[
    str,
    typer.Option(
        help="Framework: torch, tf or flax (default: the first that is installed).",
        metavar="NAME",
        callback=chosen,
        show_default=False,
    ),
]
"""The option of every command that computes."""


def load_backend(name: str, model: str = "OPTForCausalLM") -> Any:
    """Imports a backend and returns one of its model classes, as `conversion.backends` does.

    Args:
        name: "torch", "tf" or "flax".
        model: Name of the class without a backend's prefix.

    Raises:
        ConfigError: There is no such backend, or its framework is not installed.
    """
    from conversion import backends

    if name == "torch":
        return backends.load_backend(name, model)
    with _without_log_lines():
        found = backends.load_backend(name, model)
        if name == "flax":  # libtpu, where it is installed, complains when JAX looks for devices
            import jax

            jax.devices()
        return found


@contextmanager
def _without_log_lines() -> Iterator[None]:
    """Drops what TensorFlow and libtpu write while they load: no setting keeps them from that."""
    try:
        kept = os.dup(2)
    except OSError:  # no standard error at all
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
