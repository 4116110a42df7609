"""The backends by name, imported only when one is asked for: that can take seconds."""

from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import ConfigError


class _Backend(NamedTuple):
    module: str
    prefix: str


BACKENDS = {
    "torch": _Backend("opt_torch", ""),
    "tf": _Backend("opt_tf", "TF"),
    "flax": _Backend("opt_flax", "Flax"),
}
"""Package of each backend and prefix of its classes; its name is the extra to install."""


def load_backend(name: str, model: str = "OPTForCausalLM") -> Any:
    """Imports a backend and returns one of its model classes.

    Args:
        name: "torch", "tf" or "flax".
        model: Name of the class without a backend's prefix, such as "OPTModel".

    Raises:
        ConfigError: There is no such backend, or its framework is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend: expected one of {', '.join(BACKENDS)}, received {name!r}")
    backend = BACKENDS[name]
    try:
        module = import_module(backend.module)
    except ModuleNotFoundError as error:
        if error.name == backend.module:
            raise ConfigError(f"backend {name!r} is not part of this version") from None
        raise ConfigError(
            f"backend {name!r} needs {error.name}, which is not installed: "
            f'pip install "opt-lm[{name}]"'
        ) from None
    return getattr(module, backend.prefix + model)


def to_numpy(array: Any) -> NDArray[Any]:
    """Copies a backend's array to the host, half precisions as float32 (NumPy has no bfloat16)."""
    if type(array).__module__.partition(".")[0] == "torch":
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array
    array = np.asarray(array)
    return array if array.dtype.kind in "iub" else array.astype(np.float32)


def inference(name: str) -> AbstractContextManager[Any]:
    """A context in which a backend keeps nothing for gradients (only PyTorch has to be told)."""
    if name != "torch":
        return nullcontext()
    import torch

    # On a mesh PyTorch finds out anew, for each shape, what `inference_mode` leaves whole.
    return torch.no_grad()
