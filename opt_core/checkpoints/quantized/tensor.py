"""A weight that a file keeps in a few bits, as a tensor that is dequantised when it is read."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.report import printable
from opt_core.checkpoints.tensors import FLOAT_DTYPES, HeldTensor, LazyTensor
from opt_core.errors import CheckpointError
from opt_core.params import ParamSpec
from opt_core.quantization import (
    GROUP,
    SCHEMES,
    QuantizedTensor,
    pack,
    quantize_array,
    scheme_of,
)

_BLOCK = 1 << 20  # weights at a time: temporaries are several times as large
_FLOATS = tuple(FLOAT_DTYPES.values())


@dataclass(frozen=True, eq=False)
class PackedTensor(ABC):
    """A quantised weight: a `LazyTensor` of float32 numbers.

    Attributes:
        name: Canonical name.
        shape: Shape of the weight (O, I).
        label: What it is stored as, such as "int4".
        parts: The tensors that it is made of.
    """

    name: str
    shape: tuple[int, ...]
    label: str
    parts: tuple[LazyTensor, ...] = field(repr=False)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of one element."""
        return np.dtype(np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements, dequantised."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stored_nbytes(self) -> int:
        """Bytes that it takes in its file."""
        return sum(part.nbytes for part in self.parts)

    @property
    def file(self) -> Path:
        """The file of its largest part."""
        return self.parts[0].file

    @property
    def offset(self) -> int:
        """Where that part starts."""
        return self.parts[0].offset

    def is_same_as(self, other: LazyTensor) -> bool:
        """Whether it is this one."""
        return self is other

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Part of the tensor along its first dimension."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        return HeldTensor(self.name, self.dequantize(start, max(start, stop)))

    def read(self) -> NDArray[Any]:
        """The values.

        Raises:
            CheckpointError: The numbers cannot be those of a weight.
        """
        out: NDArray[np.float32] = np.empty(self.shape, np.float32)
        step = self.step
        for i in range(0, self.shape[0], step):
            out[i : i + step] = self.dequantize(i, min(i + step, self.shape[0]))
        return out

    @property
    def step(self) -> int:
        """Rows to work on at a time."""
        return max(1, _BLOCK // max(1, self.shape[1]))

    @abstractmethod
    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Some rows of the weight."""

    def numbers(self, scheme: str) -> QuantizedTensor | None:
        """The very numbers of the file as those of a scheme of ours, if it has a place for them.

        Args:
            scheme: "int8" or "int4".
        """
        del scheme
        return None

    def is_ours(self, scheme: str) -> bool:
        """Whether it is stored as we store a weight of a scheme of ours."""
        del scheme
        return False


class Grid(NamedTuple):
    """Rows of a weight on even grids: `(steps - zeros[group]) * scales[group]`.

    Attributes:
        steps: (R, I), 0..255.
        zeros: Zero points (R, G), 0..255.
        scales: float32 (R, G).
        groups: The group of each input (I,), 0..G-1.
    """

    steps: NDArray[np.uint8]
    zeros: NDArray[np.uint8]
    scales: NDArray[np.float32]
    groups: NDArray[np.int64]


class GridTensor(PackedTensor):
    """A weight whose numbers are integers, each group of inputs with a scale and a zero point."""

    @abstractmethod
    def grid(self, start: int, stop: int) -> Grid:
        """Some rows."""

    def dequantize(self, start: int, stop: int) -> NDArray[np.float32]:
        """Some rows of the weight: one rounding, where the scale has more than 16 bits."""
        steps, zeros, scales, groups = self.grid(start, stop)
        signed = steps.astype(np.int16) - zeros.astype(np.int16)[:, groups]
        return signed * scales[:, groups]

    def numbers(self, scheme: str) -> QuantizedTensor | None:
        """The very numbers of the file as those of a scheme of ours, if it has a place for them."""
        kept = QuantizedTensor.empty(self.shape, scheme)
        for i in range(0, self.shape[0], self.step):
            part = slice(i, min(i + self.step, self.shape[0]))
            grid = self.grid(part.start, part.stop)
            if not (_fill_int8 if scheme == "int8" else _fill_int4)(kept, part, grid):
                return None
        return kept


def _fill_int8(kept: QuantizedTensor, rows: slice, grid: Grid) -> bool:
    """Whether there is one scale to a row, and steps from the zero point fit into 8 bits."""
    if grid.scales.shape[1] != 1:
        return False
    signed = grid.steps.astype(np.int16) - grid.zeros.astype(np.int16)
    if signed.min(initial=0) < -128 or signed.max(initial=0) > 127:
        return False
    kept.values[rows], kept.scales[rows] = signed, grid.scales[:, 0]
    return True


def _fill_int4(kept: QuantizedTensor, rows: slice, grid: Grid) -> bool:
    """Whether groups are made of our groups, and all numbers fit into 4 bits."""
    assert kept.zeros is not None
    free = kept.scales.shape[1] * GROUP - kept.width
    groups = np.pad(grid.groups, (0, free), "edge").reshape(-1, GROUP)
    fits = max(grid.steps.max(initial=0), grid.zeros.max(initial=0)) < 16
    if not fits or (groups != groups[:, :1]).any():
        return False
    ours = groups[:, 0]
    kept.scales[rows], kept.zeros[rows] = grid.scales[:, ours], grid.zeros[:, ours]
    kept.values[rows] = pack(grid.steps, kept.zeros[rows])
    return True


def numbers_of(name: str, stored: LazyTensor, scheme: str) -> QuantizedTensor:
    """A weight in a scheme of ours: as the file has it where that can be, or else rounded now.

    Args:
        name: Its name, for messages.
        stored: The weight, (O, I).
        scheme: "int8" or "int4".

    Raises:
        CheckpointError: It has values that are not finite.
    """
    kept = stored.numbers(scheme) if isinstance(stored, PackedTensor) else None
    return quantize_array(name, stored.read(), scheme) if kept is None else kept


def stored_scheme(entries: Sequence[tuple[ParamSpec, LazyTensor]]) -> str | None:
    """The scheme of ours that a model's weights are stored in; None: in none of them."""
    for scheme in SCHEMES:
        kinds = [(scheme_of(spec, scheme), tensor) for spec, tensor in entries]
        if all(isinstance(t, PackedTensor) and t.is_ours(kind) for kind, t in kinds if kind):
            return scheme
    return None


class Parts(NamedTuple):
    """The tensors of one quantised layer, by their last names.

    Attributes:
        name: The layer's canonical name, such as "model.decoder.layers.0.fc1".
        tensors: Last name -> tensor.
    """

    name: str
    tensors: dict[str, LazyTensor]

    def take(
        self, leaf: str, dtypes: tuple[Any, ...], shape: tuple[int | None, ...] | None = None
    ) -> LazyTensor:
        """One of the tensors.

        Args:
            leaf: Its last name.
            dtypes: The types it may have.
            shape: The shape it must have, None for any size; None: any shape.

        Raises:
            CheckpointError: It is missing, or of another type or shape.
        """
        if leaf not in self.tensors:
            some = next(iter(self.tensors.values()))
            raise CheckpointError(f"{some.file}: {printable(self.name)}.{leaf}: it is missing")
        tensor = self.tensors[leaf]
        if all(tensor.dtype != np.dtype(dtype) for dtype in dtypes):
            expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
            raise self.wrong(tensor, f"{expected} numbers", str(tensor.dtype))
        if shape is not None and (
            len(shape) != len(tensor.shape)
            or any(n is not None and n != m for n, m in zip(shape, tensor.shape, strict=True))
        ):
            wanted = ", ".join("any" if n is None else str(n) for n in shape)
            raise self.wrong(tensor, f"shape [{wanted}]", str(list(tensor.shape)))
        return tensor

    def take_floats(self, leaf: str, shape: tuple[int | None, ...] | None = None) -> LazyTensor:
        """One of the tensors, which is of floating point."""
        return self.take(leaf, _FLOATS, shape)

    def wrong(self, tensor: LazyTensor, expected: str, received: str) -> CheckpointError:
        """The error for a tensor that is not what it has to be."""
        return CheckpointError(
            f"{tensor.file}: {printable(tensor.name)}: expected {expected}, received {received}"
        )


def read_scales(tensor: LazyTensor) -> NDArray[np.float32]:
    """Scales in float32.

    Raises:
        CheckpointError: One is NaN, or infinite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        scales = tensor.read().astype(np.float32, copy=False)
    if not np.isfinite(scales).all():
        raise CheckpointError(
            f"{tensor.file}: {printable(tensor.name)}: expected finite numbers, received NaN or "
            "infinite ones"
        )
    return scales


def group_of_inputs(
    width: int, size: int | None, count: int, order: LazyTensor | None
) -> NDArray[np.int64]:
    """The group of each input.

    Args:
        width: Inputs.
        size: Inputs of a group, where they are in order; None: all of them.
        count: Groups there are.
        order: The tensor that says it in place of `size`, or None.

    Raises:
        CheckpointError: The tensor names groups that there are not.
    """
    if order is None:
        return np.arange(width) // max(1, min(size or width, width))
    groups = order.read().astype(np.int64)
    if groups.size and not 0 <= groups.min() <= groups.max() < count:
        worst = groups.min() if groups.min() < 0 else groups.max()
        raise CheckpointError(
            f"{order.file}: {printable(order.name)}: expected groups 0..{count - 1}, "
            f"received {worst}"
        )
    return groups


def check_groups(parts: Parts, scales: LazyTensor, axis: int, width: int, size: int | None) -> None:
    """Checks that there are as many scales as groups of inputs.

    Raises:
        CheckpointError: There are more, or fewer.
    """
    expected = 1 if size is None else -(-width // size)
    if scales.shape[axis] != expected:
        groups = f"{expected} groups of {size or width} inputs for {width}"
        raise parts.wrong(scales, groups, str(list(scales.shape)))
