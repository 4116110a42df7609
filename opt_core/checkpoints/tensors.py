"""Tensors inside weight files, read through a memory map: nothing is copied, nothing stays behind.

Both checkpoint formats (`safetensors_format` and `torch_format`, beside this) come down to this: a
tensor is a data type, a shape and strides at an offset of a file.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.errors import CheckpointError

FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float64": np.dtype(np.float64),
}
"""The data types weights may have, by the names the configuration uses."""

_CAST_ROWS_BYTES = 1 << 24


class LazyTensor(Protocol):
    """A tensor that is read when it is asked for: a `StoredTensor`, or one made of several."""

    @property
    def name(self) -> str:
        """Name in its file."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of one element."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        ...

    @property
    def file(self) -> Path:
        """The file that holds it, or the first of them."""
        ...

    @property
    def offset(self) -> int:
        """Where it starts in that file."""
        ...

    def is_same_as(self, other: "LazyTensor") -> bool:
        """Whether two names stand for the very same bytes."""
        ...

    def rows(self, start: int, stop: int) -> "LazyTensor":
        """Part of the tensor along its first dimension."""
        ...

    def read(self) -> NDArray[Any]:
        """The values."""
        ...


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        name: Name in its file.
        shape: Shape.
        dtype: Data type of one element; bfloat16 is `ml_dtypes.bfloat16`.
        source: The open file.
        offset: First byte of element 0, from the start of the file.
        strides: Elements to step per dimension, or None when contiguous (C order).

    Raises:
        CheckpointError: The tensor reaches outside its file, or is larger than any memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    source: TensorFile = field(repr=False)
    offset: int
    strides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if min(self.shape, default=0) < 0 or min(self.strides or (), default=0) < 0:
            raise CheckpointError(f"{self.file}: {self.name}: negative shape or strides")
        if self.nbytes >= 2**62:
            raise CheckpointError(f"{self.file}: {self.name}: impossible shape {self.shape}")
        if self.strides is not None and self.nbytes > self.source.size:
            # Rows that lie on one another: a few bytes could stand for more than any memory.
            raise CheckpointError(
                f"{self.file}: {self.name}: {self.shape} takes {self.nbytes} bytes, the file has "
                f"{self.source.size}"
            )
        if self.offset < 0 or self.offset + self.extent > self.source.size:
            raise CheckpointError(
                f"{self.file}: {self.name} ends at byte {self.offset + self.extent} but the file "
                f"has {self.source.size}: it is truncated; download it again"
            )

    @property
    def file(self) -> Path:
        """The file's path."""
        return self.source.path

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def extent(self) -> int:
        """Bytes from the first element to the end of the last one, in the file."""
        if self.strides is None or 0 in self.shape:
            return self.nbytes
        steps = zip(self.shape, self.strides, strict=True)
        return (1 + sum((n - 1) * step for n, step in steps)) * self.dtype.itemsize

    def is_same_as(self, other: LazyTensor) -> bool:
        """Whether two names stand for the very same bytes, seen the same way."""
        if not isinstance(other, StoredTensor):
            return False
        mine, its = ((t.source, t.offset, t.shape, t.strides, t.dtype) for t in (self, other))
        return mine == its

    def transposed(self) -> "StoredTensor":
        """The same elements with the dimensions in reverse order."""
        steps = self.strides
        if steps is None:
            steps = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        return replace(self, shape=self.shape[::-1], strides=steps[::-1])

    def rows(self, start: int, stop: int) -> "StoredTensor":
        """Part of the tensor along its first dimension."""
        step = math.prod(self.shape[1:]) if self.strides is None else self.strides[0]
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        return replace(
            self,
            shape=(max(0, stop - start), *self.shape[1:]),
            offset=self.offset + start * step * self.dtype.itemsize,
        )

    def read(self) -> NDArray[Any]:
        """The tensor as a view of the file; no memory is used until its pages are touched.

        The array may be written to: changes stay in memory, where later reads of the same open file
        see them while the array lives, and never reach the file. It is a copy only where the file
        places the tensor at an address its data type does not allow. The file must not be shortened
        or overwritten in place while the array lives; replacing it by another file is harmless.
        """
        if self.nbytes == 0:
            return np.empty(self.shape, self.dtype)
        steps = None if self.strides is None else [n * self.dtype.itemsize for n in self.strides]
        buffer = self.source.view(self.offset, self.offset + self.extent)
        array: NDArray[Any] = np.ndarray(self.shape, self.dtype, buffer, 0, steps)
        # Copied byte by byte in the order of the file: strides and odd addresses together are slow.
        return array if array.flags.aligned else array.copy("K")


@dataclass(frozen=True)
class HeldTensor:
    """A tensor that is in memory: of a `state_dict` that a caller has.

    Attributes:
        name: Its name there.
        array: The values.
    """

    name: str
    array: NDArray[Any] = field(repr=False)

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
    def file(self) -> Path:
        """It lies in none."""
        return Path("state_dict")

    @property
    def offset(self) -> int:
        """It lies nowhere."""
        return 0

    def is_same_as(self, other: LazyTensor) -> bool:
        """Whether two names stand for the very same values."""
        if not isinstance(other, HeldTensor):
            return False
        mine, its = self.array.__array_interface__, other.array.__array_interface__
        return all(mine[k] == its[k] for k in ("data", "shape", "strides", "typestr"))

    def rows(self, start: int, stop: int) -> "HeldTensor":
        """Part of the tensor along its first dimension."""
        return HeldTensor(self.name, self.array[start:stop])

    def read(self) -> NDArray[Any]:
        """A copy of the values: the model's are its own."""
        return self.array.copy()


def float_dtype(name: str) -> np.dtype[Any]:
    """The data type of a name the configuration uses, such as "bfloat16".

    Raises:
        CheckpointError: Weights cannot have this type.
    """
    if name not in FLOAT_DTYPES:
        expected = ", ".join(FLOAT_DTYPES)
        raise CheckpointError(f"dtype: expected one of {expected}, received {name!r}")
    return FLOAT_DTYPES[name]


def cast_array(name: str, array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    """The array in another floating-point type, rounded to nearest even; itself if it has it.

    Args:
        name: Name of the tensor, for messages.
        array: Any floating-point array.
        dtype: The type wanted.

    Raises:
        CheckpointError: A finite value is out of the new type's range.
    """
    if array.dtype == dtype:
        return array
    try:
        with np.errstate(over="raise", under="ignore"):
            if array.ndim and array.dtype == FLOAT_DTYPES["bfloat16"]:
                return _cast_rows(array, dtype)
            return array.astype(dtype, order="C")
    except FloatingPointError:
        raise CheckpointError(
            f"{name}: values beyond the range of {dtype.name}; load it as bfloat16 or float32"
        ) from None


def _cast_rows(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    # bfloat16 to float16 goes through float32, whose conversion reports an overflow; by rows, so
    # that the float32 copy stays small.
    out: NDArray[Any] = np.empty(array.shape, dtype)
    rows = max(1, _CAST_ROWS_BYTES // max(1, array[:1].nbytes))
    for i in range(0, len(array), rows):
        out[i : i + rows] = array[i : i + rows].astype(np.float32)
    return out
