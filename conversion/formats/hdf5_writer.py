"""Writes HDF5 files whose data the HDF5 library never sees.

The library lays the file out in memory, where every dataset gets its place but no values; then the
layout and the arrays are written by hand. It would crash when a disk is full, and copies more.
"""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from conversion.formats.hdf5 import require_h5py
from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.errors import CheckpointError

_PAGE = 4096
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def write_hdf5(
    path: Path, tensors: Sequence[PendingTensor], describe: Callable[[Any, Any], None]
) -> None:
    """Writes an HDF5 file, one tensor in memory at a time.

    Args:
        path: The file.
        tensors: What to write; a name is the path from the root group.
        describe: Gives groups their attributes, called with the open file and the h5py module.

    Raises:
        CheckpointError: h5py is missing, or the disk refuses.
    """
    h5py = require_h5py(path)
    outline = _SparseFile()
    with h5py.File(outline, "w") as file:
        describe(file, h5py)
        places = [_reserve(file, tensor, h5py) for tensor in tensors]
    try:
        with path.open("wb") as out:
            out.truncate(outline.size)
            for number, page in sorted(outline.pages.items()):
                out.seek(number * _PAGE)
                out.write(page[: outline.size - number * _PAGE])
            for place, tensor in zip(places, tensors, strict=True):
                array = tensor.fetch()
                out.seek(place)
                out.write(array.reshape(-1).view(np.uint8).data)
                del array  # or the next tensor would be made while this one is still held
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None


def _reserve(file: Any, tensor: PendingTensor, h5py: Any) -> int:
    """Makes a dataset without values; returns where in the file they belong."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    is_bfloat16 = tensor.dtype == _BFLOAT16
    dtype = np.dtype("V2") if is_bfloat16 else tensor.dtype
    made = file.create_dataset(tensor.name, tensor.shape, dtype, dcpl=settings)
    if is_bfloat16:
        made.attrs["dtype"] = "bfloat16"  # as Keras 3 stores it
    return made.id.get_offset()


class _SparseFile(io.RawIOBase):
    """A file in memory that takes memory only where something was written."""

    def __init__(self) -> None:
        self.size = self.at = 0
        self.pages: dict[int, bytearray] = {}

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at

    def truncate(self, size: int | None = None) -> int:
        self.size = self.at if size is None else size
        return self.size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        for done, start, page in self._parts(len(view)):
            count = min(_PAGE - start, len(view) - done)
            view[done : done + count] = self.pages.get(page, bytearray(_PAGE))[
                start : start + count
            ]
        self.at += len(view)
        return len(view)

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        for done, start, page in self._parts(len(view)):
            part = view[done : done + _PAGE - start]
            self.pages.setdefault(page, bytearray(_PAGE))[start : start + len(part)] = part
        self.at += len(view)
        self.size = max(self.size, self.at)
        return len(view)

    def _parts(self, length: int) -> list[tuple[int, int, int]]:
        """Each page that a length from here covers: bytes before it, its first byte, its number."""
        parts: list[tuple[int, int, int]] = []
        done = 0
        while done < length:
            page, start = divmod(self.at + done, _PAGE)
            parts.append((done, start, page))
            done += _PAGE - start
        return parts
