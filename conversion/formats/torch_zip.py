"""Writes torch's zip format without torch: what `torch.load(weights_only=True)` reads and maps."""

import math
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conversion.streaming.lazy_tensors import contiguous
from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.checkpoints.torch_pickle import STORAGE_DTYPES
from opt_core.errors import CheckpointError

_STORAGES = {dtype: name.partition(".")[2] for name, dtype in STORAGE_DTYPES.items()}
_ALIGNMENT = 64
_PADDING = 0x4246  # "FB", as torch calls its extra field
_LOCAL_HEADER = 30
_ZIP64_EXTRA = 20
_ZIP64_FROM = 1 << 31
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write_torch(
    path: Path,
    tensors: Sequence[PendingTensor],
    key: str | None = None,
    others: Mapping[str, Any] | None = None,
) -> None:
    """Writes a dict of tensors, one in memory at a time.

    Args:
        path: The file.
        tensors: What to write.
        key: Where the dict of tensors is to be in a dict around it; None for no dict around it.
        others: What else is in that dict: strings, numbers, booleans, None, and dicts of them.

    Raises:
        CheckpointError: Torch has no such data type, or the disk refuses.
    """
    state = _state_dict(path, tensors)
    if key is not None:
        pairs = [*((name, _plain(value)) for name, value in (others or {}).items()), (key, state)]
        state = _dict(b"}", pairs)
    try:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            root = path.name.partition(".")[0]
            _write(archive, f"{root}/data.pkl", b"\x80\x02" + state + b".")
            _write(archive, f"{root}/byteorder", b"little")
            for i, tensor in enumerate(tensors):
                array = contiguous(tensor.fetch())
                _write(archive, f"{root}/data/{i}", array.reshape(-1).view("uint8").data)
                del array
            _write(archive, f"{root}/version", b"3\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from None


def _write(archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    info = zipfile.ZipInfo(name)
    large = len(data) >= _ZIP64_FROM
    assert archive.fp is not None
    before = archive.fp.tell() + _LOCAL_HEADER + len(name) + large * _ZIP64_EXTRA
    padding = -before % _ALIGNMENT
    if padding:
        padding += _ALIGNMENT * (padding < 4)  # the extra field's own head
        info.extra = struct.pack("<HH", _PADDING, padding - 4) + b"Z" * (padding - 4)
    with archive.open(info, "w", force_zip64=large) as entry:
        entry.write(data)


def _state_dict(path: Path, tensors: Iterable[PendingTensor]) -> bytes:
    pairs: list[tuple[str, bytes]] = []
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in _STORAGES:
            raise CheckpointError(f"{path}: {tensor.name}: torch has no {tensor.dtype}")
        size = math.prod(tensor.shape)
        storage = _tuple(
            _text("storage"),
            f"ctorch\n{_STORAGES[tensor.dtype]}\n".encode(),
            *(_text(str(i)), _text("cpu"), _integer(size)),
        )
        steps = [math.prod(tensor.shape[axis + 1 :]) for axis in range(len(tensor.shape))]
        arguments = _tuple(
            storage + b"Q",
            _integer(0),
            _tuple(*map(_integer, tensor.shape)),
            _tuple(*map(_integer, steps)),
            b"\x89",  # no gradient
            _ORDERED_DICT,  # no hooks
        )
        pairs.append((tensor.name, b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"))
    return _dict(_ORDERED_DICT, pairs)


def _dict(empty: bytes, pairs: Iterable[tuple[str, bytes]]) -> bytes:
    return empty + b"(" + b"".join(_text(key) + value for key, value in pairs) + b"u"


def _plain(value: Any) -> bytes:
    match value:
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            return _integer(value)
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return _text(value)
        case _:
            return _dict(b"}", [(name, _plain(item)) for name, item in value.items()])


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _integer(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"
