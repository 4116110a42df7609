"""bitsandbytes' files: LLM.int8(), and four bits as nf4 or fp4.

Eight bits: `weight` int8 (O, I), and `SCB`, the largest absolute value of each output, which 127
stands for.

Four bits: `weight` has two numbers a byte, the earlier one in the high bits, row after row; each
is a place in `weight.quant_map`, whose value is multiplied by its block's `weight.absmax`. What has
no tensor of its own is JSON, as bytes, in `weight.quant_state.bitsandbytes__nf4` or `…__fp4`. In
double quantisation (QLoRA, arXiv 2305.14314) `weight.absmax` is places too, in
`weight.nested_quant_map`, with `weight.nested_absmax` for each block of them, and an offset is
added.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.quantized.tensor import (
    Grid,
    GridTensor,
    PackedTensor,
    Parts,
    read_scales,
)
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.errors import CheckpointError
from opt_core.json_files import parse_json_object

LEAVES_8 = ("SCB", "weight", "weight_format")
"""Last names of an eight-bit layer's tensors, the one that every layer has first."""
STATES = ("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4")
LEAVES_4 = (
    *STATES, "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax",
    "weight.nested_quant_map",
)  # fmt: skip
"""Last names of a four-bit layer's tensors, of which it has one of the first two."""

_LARGEST = np.float32(127)
_MIDDLE = 128  # numbers of int8 as steps from the smallest
_MAX_STATE = 1 << 16
_MAX_BLOCK = 1 << 20


class Int8Tensor(GridTensor):
    """A weight of LLM.int8()."""

    def grid(self, start: int, stop: int) -> Grid:
        """Some rows."""
        weights, largest = self.parts[:2]
        steps = weights.read()[start:stop].view(np.uint8) ^ np.uint8(_MIDDLE)
        scales = read_scales(largest).reshape(-1, 1)[start:stop] / _LARGEST
        zeros = np.full(scales.shape, _MIDDLE, np.uint8)
        return Grid(steps, zeros, scales, np.zeros(self.shape[1], np.int64))


class _State(NamedTuple):
    """A four-bit weight's description of itself.

    Attributes:
        shape: Its shape.
        blocksize: Numbers that share a largest value.
        nested_blocksize: Largest values that share one; None: they are stored as they are.
        offset: What is added to these.
    """

    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int | None
    offset: float


@dataclass(frozen=True, eq=False)
class Bits4Tensor(PackedTensor):
    """A weight of nf4 or fp4.

    Attributes:
        state: What it says of itself.
        tables: Its other tensors, by their last names.
    """

    state: _State
    tables: dict[str, LazyTensor]

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Some rows of the weight."""
        width, size = self.shape[1], self.state.blocksize
        begin, end = start * width, stop * width
        packed = self.parts[0].read().reshape(-1).view(np.uint8)[begin // 2 : -(-end // 2)]
        places = np.stack((packed >> 4, packed & 15), -1).reshape(-1)[begin % 2 :][: end - begin]
        values = read_scales(self.tables["weight.quant_map"])[places]
        largest = self._largest(begin // size, -(-end // size))
        blocks = np.arange(begin, end) // size - begin // size
        return (values * largest[blocks]).reshape(stop - start, width)

    def _largest(self, start: int, stop: int) -> NDArray[np.float32]:
        """The largest values of some blocks."""
        stored, nested = self.tables["weight.absmax"], self.state.nested_blocksize
        if nested is None:
            return read_scales(stored).reshape(-1)[start:stop]
        values = read_scales(self.tables["weight.nested_quant_map"])
        largest = read_scales(self.tables["weight.nested_absmax"]).reshape(-1)
        places = stored.read().reshape(-1)[start:stop]
        blocks = np.arange(start, stop) // nested
        return values[places] * largest[blocks] + np.float32(self.state.offset)


def open_layer(parts: Parts, settings: Any) -> PackedTensor:
    """The weight that a layer's tensors stand for.

    Raises:
        CheckpointError: They do not fit one another, or say what cannot be.
    """
    return _open_4(parts) if settings.bits == 4 else _open_8(parts)


def _open_8(parts: Parts) -> Int8Tensor:
    weights = parts.take("weight", (np.int8,), (None, None))
    largest = parts.take_floats("SCB", (weights.shape[0],))
    found = (weights, largest)
    if "weight_format" in parts.tensors:
        kind = parts.take("weight_format", (np.uint8, np.int64, np.int32), ())
        if value := int(kind.read()):
            raise parts.wrong(kind, "0 (rows, the format that is saved)", str(value))
        found = (*found, kind)
    name = f"{parts.name}.weight"
    return Int8Tensor(name, (weights.shape[0], weights.shape[1]), "int8", found)


def _open_4(parts: Parts) -> Bits4Tensor:
    named = [leaf for leaf in STATES if leaf in parts.tensors]
    if len(named) > 1:
        tensor = parts.tensors[named[1]]
        raise parts.wrong(tensor, "one quant_state", "two")
    leaf = named[0] if named else STATES[0]
    state = _read_state(parts, parts.take(leaf, (np.uint8,), (None,)), leaf[-3:])
    count = math.prod(state.shape)
    weights = parts.take("weight", (np.uint8, np.int8, *_STORAGE))
    if weights.nbytes < -(-count // 2) or weights.nbytes > -(-count // 2) + 7:
        expected = f"{-(-count // 2)} bytes for {list(state.shape)}"
        raise parts.wrong(weights, expected, f"{weights.nbytes}")
    blocks = -(-count // state.blocksize)
    tables = {"weight.quant_map": parts.take_floats("weight.quant_map", (16,))}
    if state.nested_blocksize is None:
        tables["weight.absmax"] = _flat(parts, "weight.absmax", _STORAGE, blocks)
    else:
        tables["weight.absmax"] = _flat(parts, "weight.absmax", (np.uint8,), blocks)
        nested = -(-blocks // state.nested_blocksize)
        tables["weight.nested_absmax"] = _flat(parts, "weight.nested_absmax", _STORAGE, nested)
        tables["weight.nested_quant_map"] = parts.take_floats("weight.nested_quant_map", (256,))
    found = (weights, *tables.values(), parts.tensors[leaf])
    return Bits4Tensor(f"{parts.name}.weight", state.shape, leaf[-3:], found, state, tables)


_STORAGE = (np.float32, np.float16, ml_dtypes.bfloat16)
"""Types that four bits are also kept as (`bnb_4bit_quant_storage`): their bytes count."""


def _flat(parts: Parts, leaf: str, dtypes: tuple[Any, ...], count: int) -> LazyTensor:
    tensor = parts.take(leaf, dtypes)
    if math.prod(tensor.shape) != count:
        raise parts.wrong(tensor, f"{count} numbers", str(list(tensor.shape)))
    return tensor


def _read_state(parts: Parts, tensor: LazyTensor, kind: str) -> _State:
    if tensor.nbytes > _MAX_STATE:
        raise parts.wrong(tensor, f"at most {_MAX_STATE} bytes", str(tensor.nbytes))
    what = f"{tensor.file}: {tensor.name}"
    values = parse_json_object(tensor.read().tobytes(), what, CheckpointError, unique_keys=True)
    if values.get("quant_type") != kind:
        raise parts.wrong(tensor, f"quant_type {kind!r}", repr(values.get("quant_type")))
    given: object = values.get("shape")
    shape = cast("list[Any]", given) if isinstance(given, list) else []
    if len(shape) != 2 or not all(type(n) is int and 0 < n < 1 << 31 for n in shape):
        raise parts.wrong(tensor, "the shape of a matrix", repr(values.get("shape")))
    nested = None
    if "weight.nested_absmax" in parts.tensors:
        nested = _blocksize(parts, tensor, values, "nested_blocksize")
    offset = values.get("nested_offset", 0.0)
    if type(offset) not in (int, float) or not math.isfinite(offset):
        raise parts.wrong(tensor, "a finite nested_offset", repr(offset))
    size = _blocksize(parts, tensor, values, "blocksize")
    return _State((shape[0], shape[1]), size, nested, float(offset))


def _blocksize(parts: Parts, tensor: LazyTensor, values: dict[str, Any], name: str) -> int:
    size = values.get(name)
    if type(size) is not int or not 1 <= size <= _MAX_BLOCK:
        raise parts.wrong(tensor, f"{name} of 1..{_MAX_BLOCK}", repr(size))
    return size
