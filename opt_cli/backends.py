"""Which framework a command computes with, and how it is loaded without its own chatter."""

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Annotated, Any

import typer

from opt_cli import console

FRAMEWORKS = {"torch": "torch", "tf": "tensorflow", "flax": "flax"}
"""The framework of each backend, the first choice first."""


DISPENSABLE = ("IPython", "jax", "matplotlib", "pandas", "scipy", "sklearn")
"""Libraries that TensorFlow and Keras import where they find them, though no command needs it."""

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
    with _without_log_lines(), _without(DISPENSABLE if name == "tf" else ()):
        found = backends.load_backend(name, model)
        if name == "flax":  # libtpu, where it is installed, complains when JAX looks for devices
            import jax

            jax.devices()
        return found


@contextmanager
def _without(modules: Iterable[str]) -> Iterator[None]:
    """Has modules that are not imported yet look as if they were not installed.

    TensorFlow and Keras try to import them; that takes as long as all the rest of both.
    """
    imported: dict[str, Any] = sys.modules
    hidden = [name for name in modules if name not in imported]
    imported.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del imported[name]


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
