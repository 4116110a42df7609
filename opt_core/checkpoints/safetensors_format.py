"""The safetensors format: headers read through the `safetensors` library, data mapped in place.

One writer, because `safetensors.numpy.save_file` wants every tensor in memory at once, and writes
wrong values for a transposed one (https://github.com/safetensors/safetensors/issues/825).
"""

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # also makes bfloat16 known to the library
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import StoredTensor
from opt_core.errors import CheckpointError
from opt_core.json_files import parse_json_object

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000  # the library's own limit
_ALIGNMENT = 64  # a cache line; enough for every array type, and for XLA to use the map as it is


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to be written, and how to get it when its turn comes.

    Attributes:
        name: Name in the file.
        shape: Shape the array will have.
        dtype: Data type the array will have.
        fetch: Called once, to make the array, which may be used until another tensor's is fetched:
            it may be in memory that takes turns.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    fetch: Callable[[], NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Reads the header of a safetensors file: every tensor's name, type, shape and place.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is missing or damaged, or holds a data type no OPT file uses.
    """
    source = TensorFile(path)
    try:
        with safe_open(path, framework="np"):  # checks the header against the file, in full
            pass
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a sound safetensors file: {error}; download or save it again"
        ) from None
    length = int.from_bytes(source.bytes_at(0, 8), "little")
    if not 0 < length <= min(_MAX_HEADER, source.size - 8):
        raise CheckpointError(f"{path}: header of {length} bytes in a file of {source.size}")
    header = parse_json_object(source.bytes_at(8, length), path, CheckpointError, unique_keys=True)
    header.pop("__metadata__", None)
    return {name: _stored(name, entry, source, 8 + length) for name, entry in header.items()}


def _stored(name: str, entry: dict[str, Any], source: TensorFile, start: int) -> StoredTensor:
    code, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if code not in DTYPES:
        raise CheckpointError(
            f"{source.path}: {name} has data type {code}; expected one of {', '.join(DTYPES)}"
        )
    stored = StoredTensor(name, shape, DTYPES[code], source, start + begin)
    if stored.nbytes != end - begin:
        raise CheckpointError(
            f"{source.path}: {name}: {code} {list(shape)} takes {stored.nbytes} bytes, "
            f"the header gives it {end - begin}"
        )
    return stored


def write_safetensors(
    path: Path, tensors: Iterable[PendingTensor], metadata: dict[str, str] | None = None
) -> None:
    """Writes a safetensors file, one tensor in memory at a time, and renames it into place.

    Args:
        path: The file; its folder must exist. Until the end it is called `.<name>.tmp`.
        tensors: What to write. Wider data types are placed first, so that each is aligned.
        metadata: Strings for the header; None means {"format": "pt"}, which `transformers` wants.

    Raises:
        CheckpointError: An array is not of the announced shape or type, or the disk refuses.
    """
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    part = path.with_name(f".{path.name}.tmp")
    try:
        with part.open("wb") as file:
            file.write(_header(ordered, metadata or {"format": "pt"}, path))
            for tensor in ordered:
                file.write(_payload(tensor, path))
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _header(tensors: Sequence[PendingTensor], metadata: dict[str, str], path: Path) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for tensor in tensors:
        if tensor.name in entries:
            raise CheckpointError(f"{path}: {tensor.name} is to be written twice")
        if tensor.dtype not in _CODES:
            raise CheckpointError(f"{path}: {tensor.name}: no safetensors type for {tensor.dtype}")
        begin, end = end, end + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _payload(tensor: PendingTensor, path: Path) -> memoryview:
    array = tensor.fetch()
    if array.shape != tensor.shape or array.dtype != tensor.dtype:
        raise CheckpointError(
            f"{path}: {tensor.name}: expected {tensor.dtype} {list(tensor.shape)}, "
            f"received {array.dtype} {list(array.shape)}"
        )
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
