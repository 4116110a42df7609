"""compressed-tensors' files, which vLLM and transformers read.

A layer (O, I) of "pack-quantized" is `weight_packed` int32 (O, words), packed along the inputs,
with `weight_shape` (2,); of the other formats, `weight` in int8 or float8. Both have
`weight_scale`: (1,) for the whole, (O, 1), (O, G), or one for each block of outputs and inputs.
Zero points, if there are any, are `weight_zero_point`: int8 of the same shape, or packed along the
outputs. Integers are stored with the sign in "int-quantized", and with half of their range added
in "pack-quantized". `weight_g_idx` (I,) is the group of each input, where act-order left them in
another order.
"""

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.quantized.bits import unpack_bits, words_for
from opt_core.checkpoints.quantized.settings import CompressedTensors, WeightArguments
from opt_core.checkpoints.quantized.tensor import (
    Grid,
    GridTensor,
    PackedTensor,
    Parts,
    group_of_inputs,
    read_scales,
)
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.errors import CheckpointError
from opt_core.quantization import GROUP, QuantizedTensor

LEAVES = (
    "weight_scale", "weight_packed", "weight", "weight_shape", "weight_zero_point", "weight_g_idx",
)  # fmt: skip
"""Last names of a layer's tensors, the one that every layer has first."""
ASIDE = (
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point", "k_scale", "v_scale"),
    *("k_zero_point", "v_zero_point", "q_scale"),
)
"""Last names of tensors for rounding inputs and caches, which is not done here."""

_FLOAT8 = ml_dtypes.float8_e4m3fn


@dataclass(frozen=True, eq=False)
class CompressedTensor(GridTensor):
    """A weight of integers.

    Attributes:
        arguments: How it is stored.
        scales: Its scales.
        zeros: Its zero points, or None.
        order: The tensor of each input's group, or None.
    """

    arguments: WeightArguments
    scales: LazyTensor
    zeros: LazyTensor | None
    order: LazyTensor | None

    def grid(self, start: int, stop: int) -> Grid:
        """Some rows."""
        (outputs, width), bits = self.shape, self.arguments.bits
        packed = self.parts[0].read()[start:stop]
        half = np.uint8(1 << (bits - 1))
        is_packed = self.arguments.format == "pack-quantized"
        steps = unpack_bits(packed.T, bits, width).T if is_packed else _unsigned(packed)
        half = half if is_packed else np.uint8(128)
        scales = self._each_row(read_scales(self.scales))[start:stop]
        if self.zeros is None:
            points = np.full(scales.shape, half, np.uint8)
        elif self.zeros.dtype == np.int32:
            points = unpack_bits(self.zeros.read(), bits, outputs)[start:stop]
        else:
            points = self._each_row(_unsigned(self.zeros.read()))[start:stop]
        size, count = self.arguments.group_size, scales.shape[1]
        groups = group_of_inputs(width, size, count, self.order)
        return Grid(steps, points, scales, groups)

    def numbers(self, scheme: str) -> QuantizedTensor | None:
        """The very numbers of the file: in its map where it has them as we have."""
        return self._as_ours(scheme) or GridTensor.numbers(self, scheme)

    def is_ours(self, scheme: str) -> bool:
        """Whether it is stored as we store a weight of a scheme of ours."""
        kind = self.arguments
        if self.order is not None:
            return False
        if scheme == "int4":
            return (kind.format, kind.bits, kind.group_size) == ("pack-quantized", 4, GROUP)
        return (kind.bits, kind.strategy, self.zeros) == (8, "channel", None)

    def _as_ours(self, scheme: str) -> QuantizedTensor | None:
        """The numbers without a look at each: those of four bits are the file's own bytes."""
        outputs, width = self.shape
        if not self.is_ours(scheme) or (scheme == "int4" and width % GROUP):
            return None
        values, scales = self.parts[0].read(), read_scales(self.scales)
        if scheme == "int8":
            if values.dtype != np.int8:
                values = _unsigned(values.view(np.int8)[:, :width]).view(np.int8)
            return QuantizedTensor(scheme, values, scales[:, 0], None, width)
        if self.zeros is None:
            zeros = np.full(scales.shape, 1 << 3, np.uint8)
        else:
            zeros = unpack_bits(self.zeros.read(), 4, outputs)
        return QuantizedTensor(scheme, values.view(np.uint8), scales, zeros, width)

    def _each_row(self, array: NDArray[Any]) -> NDArray[Any]:
        """Scales or zero points (O, G), whatever shares them."""
        rows = array.reshape(len(array) if array.ndim else 1, -1)
        return np.broadcast_to(rows, (self.shape[0], rows.shape[1]))


def _unsigned(array: NDArray[np.int8]) -> NDArray[np.uint8]:
    return array.view(np.uint8) ^ np.uint8(128)


@dataclass(frozen=True, eq=False)
class BlockTensor(PackedTensor):
    """A weight of float8, or of integers, with a scale for each block of outputs and inputs.

    Attributes:
        block: Outputs and inputs of a block.
        scales: Its scales.
    """

    block: tuple[int, int]
    scales: LazyTensor

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Some rows of the weight."""
        values = self.parts[0].read()[start:stop].astype(np.float32)
        if not np.isfinite(values).all():
            raise CheckpointError(f"{self.file}: {self.name}: expected finite float8, received NaN")
        scales = read_scales(self.scales)
        scales = scales.reshape(len(scales) if scales.ndim else 1, -1)
        size = [min(n, m) for n, m in zip(self.block, self.shape, strict=True)]
        rows, columns = np.arange(start, stop) // size[0], np.arange(self.shape[1]) // size[1]
        return values * scales[rows[:, None], columns]


def open_layer(parts: Parts, settings: CompressedTensors) -> PackedTensor:
    """The weight that a layer's tensors stand for.

    Which of the settings' groups it is of is not asked of their patterns but of the tensors: two
    groups that fit the same tensors make the same weight of them.

    Raises:
        CheckpointError: They do not fit one another, or none of the groups.
    """
    first: CheckpointError | None = None
    for arguments in settings.groups:
        try:
            return _open(parts, arguments)
        except CheckpointError as error:
            first = first or error
    scales = parts.tensors["weight_scale"]
    raise first or parts.wrong(scales, "config_groups with weights", "none")


def _open(parts: Parts, arguments: WeightArguments) -> PackedTensor:
    is_packed = arguments.format == "pack-quantized"
    number = "float8" if arguments.is_float else f"int{arguments.bits}"
    if is_packed:
        shape_tensor = parts.take("weight_shape", (np.int64, np.int32), (2,))
        shape = _read_shape(parts, shape_tensor)
        words = words_for(shape[1], arguments.bits)
        values = parts.take("weight_packed", (np.int32,), (shape[0], words))
        found: tuple[LazyTensor, ...] = (values, shape_tensor)
    else:
        kind = _FLOAT8 if arguments.is_float else np.int8
        values = parts.take("weight", (kind,), (None, None))
        shape, found = (values.shape[0], values.shape[1]), (values,)
    scales = _take_scales(parts, arguments, shape)
    found = (*found, scales)
    name = f"{parts.name}.weight"
    if arguments.is_float or arguments.strategy == "block":
        if "weight_zero_point" in parts.tensors and not arguments.is_float:
            zeros = parts.tensors["weight_zero_point"]
            raise parts.wrong(zeros, "no zero points with blocks", str(list(zeros.shape)))
        return BlockTensor(name, shape, number, found, _block(arguments, shape), scales)
    zeros = order = None
    if not arguments.symmetric:
        count = scales.shape[-1] if len(scales.shape) > 1 else 1
        if is_packed and arguments.strategy in ("group", "channel"):
            rows = words_for(shape[0], arguments.bits)
            zeros = parts.take("weight_zero_point", (np.int32,), (rows, count))
        else:
            zeros = parts.take("weight_zero_point", (np.int8,), scales.shape)
        found = (*found, zeros)
    if "weight_g_idx" in parts.tensors:
        order = parts.take("weight_g_idx", (np.int32, np.int64), (shape[1],))
        found = (*found, order)
    return CompressedTensor(name, shape, number, found, arguments, scales, zeros, order)


def _read_shape(parts: Parts, tensor: LazyTensor) -> tuple[int, int]:
    rows, width = (int(n) for n in tensor.read())
    if not (0 < rows < 1 << 31 and 0 < width < 1 << 31):
        raise parts.wrong(tensor, "the shape of a matrix", f"[{rows}, {width}]")
    return rows, width


def _take_scales(parts: Parts, arguments: WeightArguments, shape: tuple[int, int]) -> LazyTensor:
    outputs, width = shape
    if arguments.strategy == "tensor":
        scales = parts.take_floats("weight_scale")
        if any(n != 1 for n in scales.shape):
            raise parts.wrong(scales, "one scale", str(list(scales.shape)))
        return scales
    rows, columns = _block(arguments, shape)
    expected = (-(-outputs // rows), -(-width // columns))
    return parts.take_floats("weight_scale", expected)


def _block(arguments: WeightArguments, shape: tuple[int, int]) -> tuple[int, int]:
    """Outputs and inputs that share a scale."""
    if arguments.strategy == "tensor":
        return shape
    if arguments.strategy == "channel":
        return 1, shape[1]
    if arguments.block is not None:
        return arguments.block
    assert arguments.group_size is not None
    return 1, arguments.group_size
