"""Where a model's tensors come from: its own formats, those that `conversion` reads, or memory."""

import re
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from opt_core.checkpoints.load import (
    Checkpoint,
    canonical_name,
    has_own_format,
    open_checkpoint,
    unwrapped,
)
from opt_core.checkpoints.tensors import HeldTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError

_KERNEL = re.compile(r"\bfc1[./]kernel(:0)?$")


def open_any(path: Path) -> tuple[Checkpoint, Callable[[], OPTConfig], tuple[str, ...]]:
    """Opens a checkpoint in any format, straight from its files.

    Args:
        path: Folder, weight file, or index.

    Returns:
        Its tensors under canonical names; a function that reads or derives its configuration; and
        assumptions that had to be made.

    Raises:
        CheckpointError: There are no weights, or they are damaged, or nothing here reads them.
    """
    checkpoint = open_checkpoint(path) if has_own_format(path) else None
    if checkpoint is None or any(
        map(_KERNEL.search, (t.name for t in checkpoint.tensors.values()))
    ):
        # Kernels in safetensors: a model of TensorFlow or Flax saved them, under its names.
        readers = _other_formats()
        if readers is not None:
            found = readers.open_any_checkpoint(path)
            return found.checkpoint, found.read_config, found.notes
        checkpoint = open_checkpoint(path)  # says what it expected
    return checkpoint, lambda: OPTConfig.from_pretrained(checkpoint.folder), ()


def held_checkpoint(
    tensors: Mapping[str, Any], as_array: Callable[[Any], NDArray[Any]]
) -> Checkpoint:
    """The checkpoint that a caller's `state_dict` is.

    Raises:
        CheckpointError: It is no mapping of tensors.
    """
    if not isinstance(tensors, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise CheckpointError(f"state_dict: expected a mapping, received {type(tensors).__name__}")
    named = {name: canonical_name(name) for name in tensors}
    held = {new: HeldTensor(old, as_array(tensors[old])) for old, new in named.items() if new}
    return unwrapped(Checkpoint(Path("state_dict"), (), held, "torch-bin"))


def _other_formats() -> Any:
    """The readers of all other formats, or None where that package is not there.

    It builds on this one, so it is looked up by its name when it is needed, and only here.
    """
    try:
        return import_module("conversion.readers")
    except ModuleNotFoundError as error:
        if error.name in ("conversion", "conversion.readers"):
            return None
        raise
