"""Readers, one per format: found from a checkpoint's files; its tensors under canonical names."""

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from conversion.formats.deepspeed import find_deepspeed, open_deepspeed
from conversion.formats.flax_msgpack import read_flax
from conversion.formats.keras_hub import has_offset_rows, keras_hub_config, read_keras_hub
from conversion.formats.metaseq import derive_config, open_metaseq, torch_files
from conversion.formats.names import from_keras2, from_path, is_kernel
from conversion.formats.numpy_files import is_numpy_folder, open_numpy
from conversion.formats.tf_h5 import read_tf_h5
from conversion.formats.torch_distributed import METADATA, open_distributed
from conversion.streaming.lazy_tensors import transposed
from opt_core.adapters.folders import split_adapter
from opt_core.adapters.merging import merge_adapter
from opt_core.adapters.tensors import AdapterFolder
from opt_core.checkpoints.load import (
    Checkpoint,
    Format,
    canonical_name,
    open_checkpoint,
    read_files,
    read_index,
)
from opt_core.checkpoints.plan import LoadPlan, plan_load
from opt_core.checkpoints.safetensors_format import read_safetensors
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.json_files import read_json
from opt_core.params import Head


class _Reader(NamedTuple):
    format: Format
    read: Callable[[Path], Mapping[str, LazyTensor]]
    rename: Callable[[str], str | None]


def _from_flax(name: str) -> str | None:
    return from_path(name.split("/"))


_TF = _Reader("tf-h5", read_tf_h5, from_keras2)
_FLAX = _Reader("flax-msgpack", read_flax, _from_flax)
_KERAS_HUB = _Reader("keras-hub", read_keras_hub, canonical_name)
_TORCH_SUFFIXES = (".pt", ".pth", ".ckpt")
_FSDP = "pytorch_model_fsdp"  # accelerate's name for the whole model, or for a folder of its parts
_PARTS = "pytorch_model*_[0-9]*"  # and "pytorch_model_0" of its first versions
_CONFIG = "config.json"
_LEVELS = 2  # folders above the weights that may have their config.json
# An index comes before the single file of its format: hub repositories keep stale single files.
_NATIVE_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_READERS = {
    "tf_model.h5.index.json": _TF,
    "tf_model.h5": _TF,
    "flax_model.msgpack.index.json": _FLAX,
    "flax_model.msgpack": _FLAX,
    "model.weights.h5": _KERAS_HUB,  # KerasHub itself takes it before the index
    "model.weights.json": _KERAS_HUB,
    "task.weights.h5": _KERAS_HUB,
}
WEIGHT_FILES = (*_NATIVE_FILES, *_READERS)
"""Names of weight files and indices, in the order in which they are preferred."""


@dataclass(frozen=True)
class SourceCheckpoint:
    """A checkpoint in any format, headers read.

    Attributes:
        checkpoint: Its tensors, under canonical names and in the canonical layout.
        read_config: Reads or derives its configuration; may raise an OPTError.
        notes: Assumptions that had to be made, one line each.
        adapter: An adapter that is merged into it; None: there is none.
    """

    checkpoint: Checkpoint
    read_config: Callable[[], OPTConfig]
    notes: tuple[str, ...] = ()
    adapter: AdapterFolder | None = None

    @property
    def head(self) -> Head:
        """The head on the decoder."""
        own = head_of(self.checkpoint)
        return own if self.adapter is None or own != "causal_lm" else _head(self.adapter.parts)

    def plan(self) -> LoadPlan:
        """Compares the checkpoint with its configuration, and merges the adapter.

        Raises:
            OPTError: The configuration cannot be read, or one does not fit the other.
        """
        plan = plan_load(self.checkpoint, self.read_config(), self.head)
        return plan if self.adapter is None else merge_adapter(plan, self.head, self.adapter)


def open_any_checkpoint(
    path: Path, prefix: str = "", adapter: str | PathLike[str] | None = None, **hub: Any
) -> SourceCheckpoint:
    """Finds the weights of a folder, or takes the file named, and reads their headers.

    Args:
        path: Folder, weight file, or index of a sharded checkpoint. In a folder safetensors come
            first, then torch's, TensorFlow's, Flax' and KerasHub's files, folders of FSDP and
            DeepSpeed, other torch files such as metaseq's, and NumPy's; an index comes before the
            single file of its format. Or an adapter's folder: the weights are those of the model
            that it names.
        prefix: What the names of the model's tensors begin with, where it is part of a larger one.
        adapter: An adapter's folder or hub id, for a whole model.
        **hub: As in `opt_core.hub.resolve`, for what the adapter needs.

    Raises:
        CheckpointError: There are no weights, or they are damaged.
    """
    path, read = split_adapter(path, adapter, convertible=True, **hub)
    return replace(_open(path, prefix), adapter=read)


def _open(path: Path, prefix: str) -> SourceCheckpoint:
    if prefix:
        return _part_of_another(open_checkpoint(path, prefix))
    if not os.path.lexists(path):
        raise CheckpointError(f"{path}: no such file or folder")
    folder, name = (path, _first_of(path)) if path.is_dir() else (path.parent, path.name)
    if not name and (trained := _open_training(path)):
        return trained
    if not path.is_dir() and path.suffix in _TORCH_SUFFIXES:
        return _open_training(path) or _with_derived(*open_metaseq(path))
    if not name and torch_files(path):
        return _with_derived(*open_metaseq(path))
    if not name and is_numpy_folder(path):
        return _with_derived(open_numpy(path), {})
    kind = _READERS.get(name) or _by_suffix(name)
    if kind is None:
        return _with_config(_native(path))
    is_index = name.endswith((".index.json", ".weights.json"))
    shards = read_index(folder / name) if is_index else {name: None}
    if kind is _KERAS_HUB:  # whose index lists groups
        shards = dict.fromkeys(shards)
    checkpoint = read_files(folder, shards, kind.format, kind.read, kind.rename)
    if kind is _KERAS_HUB:
        note = "KerasHub keeps no rows in front of position 0: they are zero"
        notes = () if has_offset_rows(checkpoint.tensors) else (note,)
        return SourceCheckpoint(
            checkpoint, lambda: keras_hub_config(folder, checkpoint.files), notes
        )
    return _with_config(checkpoint)


def _native(path: Path) -> Checkpoint:
    checkpoint = open_checkpoint(path)  # which knows what to say if there is nothing
    names = [tensor.name for tensor in checkpoint.tensors.values()]
    if checkpoint.format != "safetensors" or not any(map(is_kernel, names)):
        return checkpoint
    # Saved as safetensors by a model of TensorFlow or Flax: their names, their layout.
    shards = dict.fromkeys(file.name for file in checkpoint.files)
    folder = checkpoint.files[0].parent
    return read_files(folder, shards, checkpoint.format, _read_transposed, _from_framework)


def _read_transposed(path: Path) -> Mapping[str, LazyTensor]:
    stored = read_safetensors(path)
    return {
        n: transposed(t) if is_kernel(n) and len(t.shape) == 2 else t for n, t in stored.items()
    }


def _from_framework(name: str) -> str | None:
    return from_keras2(name) if "/" in name else from_path(name.split("."))


def _open_training(path: Path) -> SourceCheckpoint | None:
    """Opens a folder in a trainer's own layout; None if it is no such folder."""
    parts = [path, *sorted(path.glob(_PARTS))] if path.is_dir() else []
    if folder := next((p for p in parts if os.path.lexists(p / METADATA)), None):
        return _near_config(open_distributed(folder))
    whole = path / f"{_FSDP}.bin"
    if whole.is_file():
        return _near_config(open_checkpoint(whole))
    if path.is_dir() and (part := next(path.glob(f"{_FSDP}_rank*.bin"), None)):
        raise CheckpointError(
            f"{part}: one process's own part of a model (LOCAL_STATE_DICT): load it where it was "
            "saved, and save it with FULL_STATE_DICT or SHARDED_STATE_DICT"
        )
    states = find_deepspeed(path)
    return None if states is None else _near_config(open_deepspeed(states))


def _near_config(checkpoint: Checkpoint) -> SourceCheckpoint:
    """Takes the config.json that is nearest above the weights, and the tokenizer beside it."""
    folder = checkpoint.folder.absolute()
    homes = [folder, *folder.parents][: _LEVELS + 1]
    home = next((home for home in homes if (home / _CONFIG).is_file()), None)
    if home is not None:
        return _with_config(replace(checkpoint, folder=home))

    def read_config() -> OPTConfig:
        raise CheckpointError(
            f"{checkpoint.folder}: no config.json with these weights: copy that of the model whose "
            "training they are from beside them"
        )

    return SourceCheckpoint(checkpoint, read_config, checkpoint.notes)


def _part_of_another(checkpoint: Checkpoint) -> SourceCheckpoint:
    """A language model inside a larger one, whose configuration has it as text_config."""
    path = checkpoint.folder / _CONFIG

    def read_config() -> OPTConfig:
        values = read_json(path)
        return OPTConfig.from_dict(values.get("text_config") or values, str(path))

    return SourceCheckpoint(checkpoint, read_config, checkpoint.notes)


def _with_config(checkpoint: Checkpoint) -> SourceCheckpoint:
    def read_config() -> OPTConfig:
        return OPTConfig.from_pretrained(checkpoint.folder)

    return SourceCheckpoint(checkpoint, read_config, checkpoint.notes)


def _first_of(folder: Path) -> str:
    return next((name for name in WEIGHT_FILES if os.path.lexists(folder / name)), "")


def _by_suffix(name: str) -> _Reader | None:
    if name.endswith((".weights.h5", ".weights.json")):
        return _KERAS_HUB
    return {".h5": _TF, ".msgpack": _FLAX}.get(Path(name).suffix)


def _with_derived(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> SourceCheckpoint:
    if (checkpoint.folder / _CONFIG).exists():
        return _with_config(checkpoint)
    note = "no config.json: the configuration was derived from the shapes and the training settings"
    notes = (note, *checkpoint.notes)
    return SourceCheckpoint(checkpoint, lambda: derive_config(checkpoint, settings), notes)


def head_of(checkpoint: Checkpoint) -> Head:
    """The head on a checkpoint's decoder."""
    return _head(checkpoint.tensors)


def _head(names: Collection[str]) -> Head:
    if "score.weight" in names:
        return "sequence_classification"
    return "question_answering" if "qa_outputs.weight" in names else "causal_lm"
