"""Flax's flax_model.msgpack: a nested dict of arrays, walked without building it.

MessagePack is a byte per kind and the lengths after it; arrays are its extension type 1, itself
MessagePack: (shape, name of the data type, bytes). Arrays of more than 2**30 bytes come in chunks
(`flax.serialization`). The walk notes where the bytes lie and never touches them.
"""

import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import ml_dtypes
import numpy as np

from conversion.formats.names import is_kernel
from conversion.streaming.lazy_tensors import joined, transposed
from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import LazyTensor, StoredTensor
from opt_core.errors import CheckpointError

MAX_CHUNK = 1 << 30
"""Bytes of the largest array that Flax writes in one piece."""

_NDARRAY = 1
_CHUNKED = "__msgpack_chunked_array__"
_MAX_DEPTH = 32
_MAX_ENTRIES = 100_000
_MAX_KEY = 4096
_DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("float64", "float32", "float16", "bfloat16", "int64", "int32", "bool")
}
# Bytes of the length that follows a kind, and of what follows besides the counted bytes.
_STRINGS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BINARIES = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_EXTENSIONS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_MAPS = {0xDE: 2, 0xDF: 4}
_ARRAYS = {0xDC: 2, 0xDD: 4}
_NUMBERS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
    0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def read_flax(path: Path) -> Mapping[str, LazyTensor]:
    """Reads which arrays a flax_model.msgpack (or one of its shards) holds, and where.

    Args:
        path: The file.

    Returns:
        Keys joined by "/" -> the tensor in the canonical layout.

    Raises:
        CheckpointError: The file is missing or damaged, or holds anything but arrays in dicts.
    """
    source = TensorFile(path)
    tree, end = walk_flax(source)
    if end != source.size:
        raise CheckpointError(f"{path}: {source.size - end} bytes too many at byte {end}")
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: expected a dict of arrays, received {_kind(tree)}")
    entries = cast(dict[str, Any], tree)
    if {"params", "opt_state"} <= entries.keys():  # a TrainState, with its step and its optimizer
        entries = {"params": entries["params"]}
    found: dict[str, LazyTensor] = {}
    for name, tensor in _leaves(entries, "", path):
        found[name] = transposed(tensor) if is_kernel(name) and len(tensor.shape) == 2 else tensor
    return found


def walk_flax(source: TensorFile) -> tuple[Any, int]:
    """Goes through the structure of a file, which takes a look in front of every array.

    Returns:
        The dicts of arrays, and where they end.

    Raises:
        CheckpointError: It is damaged.
    """
    return _Walker(source).value(0, source.size, "", 0)


def _kind(value: object) -> str:
    return "an array" if isinstance(value, StoredTensor) else type(value).__name__


def _leaves(tree: dict[str, Any], prefix: str, path: Path) -> Iterator[tuple[str, LazyTensor]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and _CHUNKED in value:
            yield name, _unchunked(name, cast(dict[str, Any], value), path)
        elif isinstance(value, dict):
            yield from _leaves(cast(dict[str, Any], value), f"{name}/", path)
        elif isinstance(value, StoredTensor):
            yield name, value
        else:
            raise CheckpointError(f"{path}: {name!r}: expected an array, received {_kind(value)}")


def _unchunked(name: str, value: dict[str, Any], path: Path) -> LazyTensor:
    shape, chunks = (
        _numbered(value.get(key), f"{name}/{key}", path) for key in ("shape", "chunks")
    )
    if not _is_shape(shape) or not all(
        isinstance(chunk, StoredTensor) and len(chunk.shape) == 1 for chunk in chunks
    ):
        raise CheckpointError(f"{path}: {name!r}: expected chunks of one array")
    return joined(name, shape, chunks)


def _is_shape(sizes: object) -> bool:
    return isinstance(sizes, list) and all(
        type(n) is int and 0 <= n < 2**48 for n in cast(list[Any], sizes)
    )


def _numbered(value: object, name: str, path: Path) -> list[Any]:
    entries = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    keys = [str(i) for i in range(len(entries))]
    if not entries or set(keys) != entries.keys():
        raise CheckpointError(f"{path}: {name!r}: expected the keys 0, 1, ... of a chunked array")
    return [entries[key] for key in keys]


@dataclass
class _Walker:
    source: TensorFile
    entries: int = 0

    def fail(self, at: int, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source.path}: byte {at}: {what}")

    def take(self, at: int, count: int, stop: int) -> bytes:
        if count < 0 or at + count > stop:
            raise self.fail(at, f"{count} bytes expected, {max(0, stop - at)} left: truncated")
        return self.source.bytes_at(at, count)

    def number(self, at: int, size: int, stop: int) -> int:
        return int.from_bytes(self.take(at, size, stop), "big")

    def value(self, at: int, stop: int, name: str, depth: int) -> tuple[Any, int]:
        """The value that starts at a byte, and where it ends."""
        self.entries += 1
        if depth > _MAX_DEPTH or self.entries > _MAX_ENTRIES:
            raise self.fail(at, "more nested, or more of it, than any checkpoint is")
        kind, here = self.take(at, 1, stop)[0], at + 1
        if kind < 0x80 or kind >= 0xE0:
            return kind - (0x100 if kind >= 0xE0 else 0), here
        if 0x80 <= kind <= 0x8F:
            return self.map(kind & 0xF, here, stop, name, depth)
        if kind in _MAPS:
            count = self.number(here, _MAPS[kind], stop)
            return self.map(count, here + _MAPS[kind], stop, name, depth)
        if 0x90 <= kind <= 0x9F:
            return self.array(kind & 0xF, here, stop, name, depth)
        if kind in _ARRAYS:
            count = self.number(here, _ARRAYS[kind], stop)
            return self.array(count, here + _ARRAYS[kind], stop, name, depth)
        if kind in _NUMBERS:
            size = struct.calcsize(_NUMBERS[kind])
            return struct.unpack(_NUMBERS[kind], self.take(here, size, stop))[0], here + size
        if kind in _CONSTANTS:
            return _CONSTANTS[kind], here
        return self.bytes(kind, here, stop, name)

    def map(self, count: int, at: int, stop: int, name: str, depth: int) -> tuple[Any, int]:
        values: dict[str, Any] = {}
        for _ in range(count):
            start = at
            key, at = self.value(at, stop, name, depth + 1)
            if not isinstance(key, str):
                raise self.fail(start, f"in {name!r}: expected a string for a key")
            if key in values:
                raise self.fail(start, f"{key!r} occurs twice in {name!r}")
            values[key], at = self.value(at, stop, f"{name}/{key}" if name else key, depth + 1)
        return values, at

    def array(self, count: int, at: int, stop: int, name: str, depth: int) -> tuple[Any, int]:
        values: list[Any] = []
        for _ in range(count):
            value, at = self.value(at, stop, name, depth + 1)
            values.append(value)
        return values, at

    def bytes(self, kind: int, at: int, stop: int, name: str) -> tuple[Any, int]:
        if 0xA0 <= kind <= 0xBF:
            return self.text(at, kind & 0x1F, stop)
        if kind in _STRINGS:
            return self.text(at + _STRINGS[kind], self.number(at, _STRINGS[kind], stop), stop)
        if kind in _BINARIES:
            start = at + _BINARIES[kind]
            length = self.number(at, _BINARIES[kind], stop)
        elif kind in _EXTENSIONS or kind in _FIXED_EXTENSIONS:
            size = _EXTENSIONS.get(kind, 0)
            length = self.number(at, size, stop) if size else _FIXED_EXTENSIONS[kind]
            start = at + size + 1
            if (code := self.number(at + size, 1, stop)) != _NDARRAY:
                raise self.fail(at, f"{name!r}: extension type {code}; expected arrays only")
        else:
            raise self.fail(at - 1, f"{kind:#x} is no MessagePack")
        if start + length > stop:
            raise self.fail(start, f"{name!r}: {length} bytes expected, {stop - start} left")
        if kind in _BINARIES:
            return range(start, start + length), start + length
        return self.ndarray(start, start + length, name), start + length

    def text(self, at: int, length: int, stop: int) -> tuple[str, int]:
        if length > _MAX_KEY:
            raise self.fail(at, f"a name of {length} bytes")
        try:
            return self.take(at, length, stop).decode(), at + length
        except UnicodeDecodeError:
            raise self.fail(at, "a name that is not UTF-8") from None

    def ndarray(self, at: int, stop: int, name: str) -> StoredTensor:
        parts, end = self.value(at, stop, name, _MAX_DEPTH - 2)
        if not isinstance(parts, list) or len(cast(list[Any], parts)) != 3 or end != stop:
            raise self.fail(at, f"{name!r}: expected an array's shape, data type and bytes")
        sizes, kind, data = cast(list[Any], parts)
        if isinstance(kind, str) and kind not in _DTYPES:
            raise self.fail(at, f"{name!r} has data type {kind!r}")
        if not isinstance(kind, str) or not isinstance(data, range) or not _is_shape(sizes):
            raise self.fail(at, f"{name!r}: expected an array's shape, data type and bytes")
        shape = tuple(cast(list[int], sizes))
        if math.prod(shape) * _DTYPES[kind].itemsize != len(data):
            raise self.fail(at, f"{name!r}: {kind} {list(shape)} does not take {len(data)} bytes")
        return StoredTensor(name, shape, _DTYPES[kind], self.source, data.start)


def write_flax(path: Path, tensors: Sequence[PendingTensor]) -> None:
    """Writes a flax_model.msgpack or one of its shards, one tensor in memory at a time.

    Args:
        path: The file.
        tensors: Names with "/" between the keys, and arrays as Flax keeps them.

    Raises:
        CheckpointError: The disk refuses.
    """
    tree: dict[str, Any] = {}
    for tensor in tensors:
        *modules, leaf = tensor.name.split("/")
        node = tree
        for module in modules:
            node = node.setdefault(module, {})
        node[leaf] = tensor
    try:
        with path.open("wb") as file:
            _write_map(file, tree)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None


def _write_map(file: BinaryIO, values: dict[str, Any]) -> None:
    file.write(_header(0x80, 16, (None, 0xDE, 0xDF), len(values)))
    for key, value in sorted(values.items()):  # as Flax does: the same model, the same file
        file.write(_string(key))
        if isinstance(value, dict):
            _write_map(file, cast(dict[str, Any], value))
        else:
            _write_tensor(file, value)


def _write_tensor(file: BinaryIO, tensor: PendingTensor) -> None:
    array = tensor.fetch().reshape(-1)
    if tensor.nbytes <= MAX_CHUNK:
        _write_array(file, array, tensor.shape)
        return
    step = MAX_CHUNK // array.itemsize
    chunks = [array[i : i + step] for i in range(0, array.size, step)]
    file.write(_header(0x80, 16, (None, 0xDE, 0xDF), 3) + _string(_CHUNKED) + b"\xc3")
    file.write(_string("shape") + _header(0x80, 16, (None, 0xDE, 0xDF), len(tensor.shape)))
    for i, size in enumerate(tensor.shape):
        file.write(_string(str(i)) + _integer(size))
    file.write(_string("chunks") + _header(0x80, 16, (None, 0xDE, 0xDF), len(chunks)))
    for i, chunk in enumerate(chunks):
        file.write(_string(str(i)))
        _write_array(file, chunk, chunk.shape)


def _write_array(file: BinaryIO, flat: Any, shape: tuple[int, ...]) -> None:
    head = _header(0x90, 16, (None, 0xDC, 0xDD), 3)
    head += _header(0x90, 16, (None, 0xDC, 0xDD), len(shape)) + b"".join(map(_integer, shape))
    head += _string(flat.dtype.name) + _header(None, 0, (0xC4, 0xC5, 0xC6), flat.nbytes)
    length = len(head) + flat.nbytes
    if length in _FIXED_EXTENSIONS.values():  # msgpack has a kind of its own for these
        kind = {size: kind for kind, size in _FIXED_EXTENSIONS.items()}[length]
        file.write(bytes([kind, _NDARRAY]))
    else:
        file.write(_header(None, 0, (0xC7, 0xC8, 0xC9), length) + bytes([_NDARRAY]))
    file.write(head)
    file.write(flat.view(np.uint8).data)


def _header(short: int | None, limit: int, kinds: tuple[int | None, int, int], count: int) -> bytes:
    """The kind and the count, in as few bytes as there is a kind for."""
    if short is not None and count < limit:
        return bytes([short | count])
    for kind, size in zip(kinds, (1, 2, 4), strict=True):
        if kind is not None and count < 1 << (8 * size):
            return bytes([kind]) + count.to_bytes(size, "big")
    raise CheckpointError(f"{count} is more than MessagePack can count")


def _string(text: str) -> bytes:
    data = text.encode()
    return _header(0xA0, 32, (0xD9, 0xDA, 0xDB), len(data)) + data


def _integer(value: int) -> bytes:
    if value < 0x80:
        return bytes([value])
    return _header(None, 0, (0xCC, 0xCD, 0xCE), value)
