"""TensorFlow's tf_model.h5 as `transformers` wrote it up to 4.57: the layout of Keras 2.

A single file repeats the model's name in front of every variable, below a group per Keras layer; a
shard has neither. Their attributes list the names: 4.57 reads those, this reader does not need to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from conversion.formats.hdf5 import read_hdf5
from conversion.formats.hdf5_writer import write_hdf5
from conversion.formats.names import TF_MODEL, is_kernel
from conversion.streaming.lazy_tensors import transposed
from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.errors import CheckpointError

_KERAS_VERSION = "2.15.0"  # of the layout; 4.57 does not look at it


def read_tf_h5(path: Path) -> Mapping[str, LazyTensor]:
    """Reads the header of a tf_model.h5 or one of its shards.

    Args:
        path: The file.

    Returns:
        TensorFlow's name, without Keras' layer -> the tensor in the canonical layout.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    found: dict[str, LazyTensor] = {}
    for full, stored in read_hdf5(path).items():
        first, _, rest = full.partition("/")
        # "model/tfopt_for_causal_lm/model/decoder/...": the layer is there twice.
        name = rest if rest.startswith("tf") else full
        if rest.startswith("tf") and f"/{first}/" not in f"/{rest}":
            raise CheckpointError(f"{path}: {full!r}: expected Keras 2's layout of layers")
        found[name] = transposed(stored) if is_kernel(name) and len(stored.shape) == 2 else stored
    return found


def write_tf_h5(path: Path, tensors: Sequence[PendingTensor], single: bool) -> None:
    """Writes a tf_model.h5 or one of its shards, one tensor in memory at a time.

    Args:
        path: The file.
        tensors: Names as in `conversion.formats.names.keras2_name`, and arrays as Keras keeps them.
        single: Whether it is the whole checkpoint.

    Raises:
        CheckpointError: A data type is none of HDF5's, h5py is missing, or the disk refuses.
    """
    if kinds := {tensor.dtype.name for tensor in tensors} - {"float64", "float32", "float16"}:
        raise CheckpointError(
            f"{path}: HDF5 has no {kinds.pop()}; convert with dtype float32 or float16"
        )
    names = [tensor.name for tensor in tensors]

    def describe_shard(file: Any, h5py: Any) -> None:
        _names(file, "layer_names", names, h5py)

    def describe_whole(file: Any, h5py: Any) -> None:
        layers = dict.fromkeys(_layer(name) for name in names)
        _names(file, "layer_names", list(layers), h5py)
        file.attrs["backend"] = "tensorflow"
        file.attrs["keras_version"] = _KERAS_VERSION
        for layer in layers:
            members = [f"{TF_MODEL}/{name}" for name in names if _layer(name) == layer]
            _names(file.create_group(layer), "weight_names", members, h5py)
        _names(file.create_group("top_level_model_weights"), "weight_names", [], h5py)

    if single:
        tensors = [replace(t, name=f"{_layer(t.name)}/{TF_MODEL}/{t.name}") for t in tensors]
    write_hdf5(path, tensors, describe_whole if single else describe_shard)


def _layer(name: str) -> str:
    return name.partition("/")[0]


def _names(group: Any, attribute: str, names: list[str], h5py: Any) -> None:
    # Strings of variable length take 16 bytes here each: those of any OPT fit an object's header.
    group.attrs.create(attribute, names, shape=(len(names),), dtype=h5py.string_dtype())
