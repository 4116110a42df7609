"""Checkpoints whose weights are quantised, as the floating-point numbers that they stand for."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.quantized import awq, bitsandbytes, compressed_tensors, gptq
from opt_core.checkpoints.quantized.settings import (
    AWQ,
    GPTQ,
    SIDE_FILE,
    BitsAndBytes,
    CompressedTensors,
    Settings,
    WeightArguments,
    find_settings,
)
from opt_core.checkpoints.quantized.tensor import PackedTensor, Parts
from opt_core.checkpoints.report import printable
from opt_core.checkpoints.safetensors_format import read_safetensors
from opt_core.checkpoints.tensors import FLOAT_DTYPES, LazyTensor, cast_array
from opt_core.errors import CheckpointError
from opt_core.quantization import QuantizedTensor

_COMPARED_ROWS = 64
_SIDE = CompressedTensors(
    (WeightArguments("int-quantized", 8, False, symmetric=True, strategy="channel"),), False
)


class _Reader(NamedTuple):
    """How a scheme's layers are found, and read.

    Attributes:
        method: Its name.
        marks: Last names of tensors of which every quantised layer has one.
        leaves: Last names of all its tensors.
        open_layer: Makes one weight of them.
        aside: Last names of tensors that are not needed.
    """

    method: str
    marks: tuple[str, ...]
    leaves: tuple[str, ...]
    open_layer: Callable[[Parts, Any], PackedTensor]
    aside: tuple[str, ...] = ()


class Opened(NamedTuple):
    """The tensors of a checkpoint.

    Attributes:
        tensors: Canonical name -> tensor; quantised weights are one `PackedTensor` each.
        notes: What was not taken as it is, one line each.
        files: Files beside those of the checkpoint that some of them are in.
        method: Whose way of quantising it is, such as "gptq"; None: it is not quantised.
    """

    tensors: dict[str, LazyTensor]
    notes: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    method: str | None = None


def dequantized(folder: Path, tensors: Mapping[str, LazyTensor]) -> Opened:
    """Puts quantised layers' tensors together, as the settings beside them say.

    Args:
        folder: Where the weights lie, and their config.json.
        tensors: Canonical name -> tensor.

    Raises:
        CheckpointError: Nobody here reads the scheme, or tensors do not fit one another, or the
            settings.
    """
    settings = find_settings(folder)
    if settings is None:
        return Opened(dict(tensors))
    reader, left = _reader(settings), dict(tensors)
    made: dict[str, LazyTensor] = {}
    for layer in _layers(tensors, reader.marks):
        leaves = {leaf: f"{layer}.{leaf}" for leaf in reader.leaves if f"{layer}.{leaf}" in left}
        parts = Parts(layer, {leaf: left.pop(name) for leaf, name in leaves.items()})
        made[f"{layer}.weight"] = reader.open_layer(parts, settings)
    for name in [
        name for name in left if name.endswith(tuple(f".{leaf}" for leaf in reader.aside))
    ]:
        del left[name]
    notes: tuple[str, ...] = ()
    if isinstance(settings, CompressedTensors) and settings.rounds_inputs:
        notes = (f"{folder}: other programs round the inputs of its layers, or the cache, too",)
    side = folder / SIDE_FILE
    if not (isinstance(settings, CompressedTensors) and side.is_file()):
        return Opened(left | made, notes, (), reader.method if made else None)
    return Opened(left | made | _side_weights(side, left), notes, (side,), reader.method)


@dataclass(frozen=True, eq=False)
class _SideTensor(PackedTensor):
    """A weight that only we keep in eight bits, in place of what others read for it.

    Attributes:
        own: The weight.
        other: That of the others, with which it is compared before it is used.
    """

    own: PackedTensor
    other: LazyTensor

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Some rows of the weight."""
        self._check()
        return self.own.dequantize(start, stop)

    def numbers(self, scheme: str) -> QuantizedTensor | None:
        """The very numbers of the file as those of a scheme of ours."""
        self._check()
        return self.own.numbers(scheme)

    def is_ours(self, scheme: str) -> bool:
        """Whether it is stored as we store a weight of a scheme of ours."""
        return self.own.is_ours(scheme)

    def _check(self) -> None:
        """Compares some rows, in the others' type.

        Raises:
            CheckpointError: Others read something else: the files were changed since.
        """
        step = max(1, self.shape[0] // _COMPARED_ROWS)
        for i in range(0, self.shape[0], step):
            mine, its = self.own.rows(i, i + 1).read(), self.other.rows(i, i + 1).read()
            if not np.array_equal(cast_array(self.name, mine, its.dtype), its):
                raise _changed(self)


def _changed(weight: PackedTensor) -> CheckpointError:
    return CheckpointError(
        f"{weight.file}: {printable(weight.name)} is not that of the other files: they were "
        "changed since; remove this file, and it is rounded anew where it is loaded"
    )


def _side_weights(path: Path, floats: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The weights of the file beside.

    Raises:
        CheckpointError: The other files have none of a name, or shape.
    """
    stored = read_safetensors(path)
    made: dict[str, LazyTensor] = {}
    for layer in _layers(stored, compressed_tensors.LEAVES[:1]):
        leaves = [leaf for leaf in ("weight_scale", "weight") if f"{layer}.{leaf}" in stored]
        parts = Parts(layer, {leaf: stored[f"{layer}.{leaf}"] for leaf in leaves})
        own = compressed_tensors.open_layer(parts, _SIDE)
        other = floats.get(own.name)
        is_float = other is not None and other.dtype in FLOAT_DTYPES.values()
        if other is None or not is_float or other.shape != own.shape:
            raise _changed(own)
        made[own.name] = _SideTensor(own.name, own.shape, own.label, own.parts, own, other)
    return made


def _layers(names: Iterable[str], marks: tuple[str, ...]) -> list[str]:
    """The layers that have one of the marks."""
    ends = [f".{mark}" for mark in marks]
    found = [name.removesuffix(end) for name in names for end in ends if name.endswith(end)]
    return list(dict.fromkeys(found))


def _reader(settings: Settings) -> _Reader:
    match settings:
        case GPTQ():
            return _Reader("gptq", gptq.LEAVES[:1], gptq.LEAVES, gptq.open_layer)
        case AWQ():
            return _Reader("awq", awq.LEAVES[:1], awq.LEAVES, awq.open_layer)
        case BitsAndBytes(bits=8):
            leaves = bitsandbytes.LEAVES_8
            return _Reader("bitsandbytes", leaves[:1], leaves, bitsandbytes.open_layer)
        case BitsAndBytes():
            own = bitsandbytes
            return _Reader("bitsandbytes", own.STATES, own.LEAVES_4, own.open_layer)
        case CompressedTensors():
            own = compressed_tensors
            name = "compressed-tensors"
            return _Reader(name, own.LEAVES[:1], own.LEAVES, own.open_layer, own.ASIDE)
