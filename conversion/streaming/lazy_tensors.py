"""Tensors made of others: joined, transposed, scaled, or few enough bytes to be in memory already.

Each has the interface of `opt_core.checkpoints.tensors.LazyTensor`: nothing is read until it is
asked for, so that a conversion never holds more than the tensor it is writing.
"""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.tensors import LazyTensor, StoredTensor
from opt_core.errors import CheckpointError

_TILE = 128  # both tiles, read and written, stay in a core's own cache


@dataclass(frozen=True)
class JoinedTensor:
    """Parts put one after the other, then seen as another shape.

    Attributes:
        name: Name of the whole.
        shape: Shape of the whole.
        parts: The parts, of one data type; along axis 0 any shapes, along axis 1 matrices.
        axis: Along which dimension they are joined, 0 or 1.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[LazyTensor, ...]
    axis: int = 0

    def __post_init__(self) -> None:
        size = sum(math.prod(part.shape) for part in self.parts)
        rows = {part.shape[0] if part.shape else 0 for part in self.parts}
        if size != math.prod(self.shape) or (self.axis and rows != {self.shape[0]}):
            shapes = ", ".join(str(list(part.shape)) for part in self.parts[:8])
            raise CheckpointError(
                f"{self.file}: {self.name!r}: parts of {shapes} do not make {list(self.shape)}"
            )
        if len({part.dtype for part in self.parts}) > 1:
            raise CheckpointError(f"{self.file}: {self.name!r}: its parts have several data types")

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of one element."""
        return self.parts[0].dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def file(self) -> Path:
        """File of the first part."""
        return self.parts[0].file

    @property
    def offset(self) -> int:
        """Where the first part starts in its file."""
        return self.parts[0].offset

    def is_same_as(self, other: LazyTensor) -> bool:
        """Whether both are made of the very same parts."""
        return (
            isinstance(other, JoinedTensor)
            and (self.shape, self.axis) == (other.shape, other.axis)
            and len(self.parts) == len(other.parts)
            and all(a.is_same_as(b) for a, b in zip(self.parts, other.parts, strict=True))
        )

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Part of the tensor along its first dimension."""
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        shape = (max(0, stop - start), *self.shape[1:])
        if self.axis:
            parts = [part.rows(start, stop) for part in self.parts]
            return JoinedTensor(self.name, shape, tuple(parts), self.axis)
        size = math.prod(self.shape[1:])
        found: list[LazyTensor] = []
        at = 0
        for part in self.parts:
            begin, end = (min(max(n * size - at, 0), _size(part)) for n in (start, stop))
            if begin < end:
                found.append(_elements(part, begin, end))
            at += _size(part)
        return JoinedTensor(self.name, shape, tuple(found or [_elements(self.parts[0], 0, 0)]))

    def read(self) -> NDArray[Any]:
        """The values, in C order."""
        if len(self.parts) == 1:
            return contiguous(self.parts[0].read()).reshape(self.shape)
        out: NDArray[Any] = np.empty(self.shape, self.dtype)
        at = 0
        for part in self.parts:
            array = part.read()
            if self.axis:
                out[:, at : at + array.shape[1]] = array
                at += array.shape[1]
            else:
                out.reshape(-1)[at : at + array.size] = array.reshape(-1)
                at += array.size
            del array  # or the next part would be read while this one is still held
        return out


def _size(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape)


def _elements(part: LazyTensor, start: int, stop: int) -> LazyTensor:
    row = max(1, math.prod(part.shape[1:]))
    if start % row or stop % row:
        raise CheckpointError(f"{part.file}: {part.name!r}: its parts end inside a row")
    return part.rows(start // row, stop // row)


@dataclass(frozen=True, eq=False)
class _Derived:
    """A tensor made of one other, with what both have in common."""

    base: LazyTensor

    @property
    def name(self) -> str:
        """Name of the tensor."""
        return self.base.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        return self.base.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of one element."""
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.base.nbytes

    @property
    def file(self) -> Path:
        """The tensor's file."""
        return self.base.file

    @property
    def offset(self) -> int:
        """Where the tensor starts in its file."""
        return self.base.offset


class TransposedTensor(_Derived):
    """A matrix seen the other way round, where it cannot be a view of its file.

    Attributes:
        base: The matrix.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, reversed."""
        return self.base.shape[::-1]

    def is_same_as(self, other: LazyTensor) -> bool:
        """Whether both are the same matrix, transposed."""
        return isinstance(other, TransposedTensor) and self.base.is_same_as(other.base)

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Part of the tensor along its first dimension, which reads all of it."""
        return MemoryTensor(self.name, self.read()[start:stop].copy(), self.file)

    def read(self) -> NDArray[Any]:
        """The values."""
        return self.base.read().T


@dataclass(frozen=True, eq=False)
class ScaledTensor(_Derived):
    """A tensor multiplied by powers of two, one per row or column: nothing is rounded.

    Attributes:
        base: The tensor.
        factors: As many as there are rows (or elements of a vector), or columns.
        axis: 0 for rows, 1 for columns.
    """

    factors: NDArray[np.float32]
    axis: int = 0

    def is_same_as(self, other: LazyTensor) -> bool:
        """Whether it is this one."""
        return self is other

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Part of the tensor along its first dimension."""
        factors = self.factors if self.axis else self.factors[start:stop]
        return replace(self, base=self.base.rows(start, stop), factors=factors)

    def read(self) -> NDArray[Any]:
        """The values.

        Raises:
            CheckpointError: One is beyond its type's range.
        """
        array = self.base.read()
        factors = self.factors.astype(array.dtype)
        with np.errstate(over="ignore"):
            out = array * (factors if self.axis or array.ndim == 1 else factors[:, None])
        if count_not_finite(out) > count_not_finite(array):
            raise CheckpointError(f"{self.file}: {self.name!r}: scaled, it is beyond {self.dtype}")
        return out


@dataclass(frozen=True, eq=False)
class MemoryTensor:
    """A small tensor that no file holds.

    Attributes:
        name: Name.
        array: The values.
        file: The file it goes with, for messages.
    """

    name: str
    array: NDArray[Any]
    file: Path

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of one element."""
        return self.array.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return self.array.nbytes

    @property
    def offset(self) -> int:
        """It is in no file."""
        return 0

    def is_same_as(self, other: LazyTensor) -> bool:
        """Whether it is this one."""
        return self is other

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Part of the tensor along its first dimension."""
        return replace(self, array=self.array[start:stop])

    def read(self) -> NDArray[Any]:
        """The values."""
        return self.array


def will_need(tensor: LazyTensor) -> None:
    """Has the system read a tensor's bytes in large pieces, now, while others are worked on.

    Page by page, in the order in which a transposition looks at them, a disk is several times as
    slow.
    """
    if not hasattr(os, "posix_fadvise"):  # Linux only; elsewhere it goes without
        return
    for part in _stored(tensor):
        with contextlib.suppress(OSError):
            file = os.open(part.file, os.O_RDONLY | os.O_NONBLOCK)
            try:
                os.posix_fadvise(file, part.offset, part.extent, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(file)


def _stored(tensor: LazyTensor) -> Iterator[StoredTensor]:
    if isinstance(tensor, StoredTensor):
        yield tensor
    elif isinstance(tensor, TransposedTensor | ScaledTensor):
        yield from _stored(tensor.base)
    elif isinstance(tensor, JoinedTensor):
        for part in tensor.parts:
            yield from _stored(part)


def transposed(tensor: LazyTensor) -> LazyTensor:
    """A matrix seen the other way round, without reading it."""
    return tensor.transposed() if isinstance(tensor, StoredTensor) else TransposedTensor(tensor)


class Buffer:
    """Memory for one array after the other: fresh memory takes as long as what it is filled with.

    Nobody is asked whether an array is still looked at: the next one overwrites it. The buffer
    grows to the largest array it has held.
    """

    def __init__(self) -> None:
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """The next array, of any values."""
        size = math.prod(shape) * dtype.itemsize
        if self._memory.size < size:
            self._memory = np.empty(0, np.uint8)  # or both would be held for a moment
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)


def contiguous(array: NDArray[Any], buffer: Buffer | None = None) -> NDArray[Any]:
    """The array in C order, copied where it is not, into the buffer if there is one.

    NumPy copies a transposed matrix column by column, each touching every page of the source. Tile
    by tile is three times as fast, and three times again where a tile is first copied to a place
    of its own: rows of a matrix as wide as a power of two drive each other out of the cache.
    """
    if array.ndim != 2 or array.flags.c_contiguous:
        return np.ascontiguousarray(array).reshape(array.shape)  # which makes 0-d arrays 1-d
    out = (buffer or Buffer()).array(array.shape, array.dtype)
    scratch: NDArray[Any] = np.empty((_TILE, _TILE), array.dtype)
    for i in range(0, array.shape[0], _TILE):
        for j in range(0, array.shape[1], _TILE):
            tile = array[i : i + _TILE, j : j + _TILE].T
            near = scratch[: tile.shape[0], : tile.shape[1]]
            near[...] = tile
            out[i : i + _TILE, j : j + _TILE] = near.T
    return out


def count_not_finite(array: NDArray[Any]) -> int:
    """How many elements are NaN or infinite."""
    bits = {2: (np.uint16, 0x7C00), 4: (np.uint32, 0x7F800000), 8: (np.uint64, 0x7FF << 52)}
    if array.dtype.itemsize not in bits:
        return 0
    kind, exponent = bits[array.dtype.itemsize]
    if array.dtype.name == "bfloat16":
        exponent = 0x7F80
    if array.ndim == 2 and array.flags.f_contiguous:
        array = array.T
    sign_cleared = kind((1 << (8 * array.dtype.itemsize - 1)) - 1)
    count, rows = 0, max(1, (1 << 22) // max(1, array[:1].nbytes))
    for i in range(0, len(array), rows):
        block = array[i : i + rows].view(kind)
        magnitudes = block & sign_cleared
        if magnitudes.size and magnitudes.max() >= exponent:  # the exponent is all ones
            count += int((magnitudes >= exponent).sum())
    return count


def joined(
    name: str, shape: Sequence[int], parts: Sequence[LazyTensor], axis: int = 0
) -> LazyTensor:
    """The parts as one tensor; the part itself where there is one, of that shape."""
    if len(parts) == 1 and parts[0].shape == tuple(shape):
        return parts[0]
    return JoinedTensor(name, tuple(shape), tuple(parts), axis)
