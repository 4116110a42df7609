"""Torch's `.bin` files (zip archives since torch 1.6), read without torch, mapped in place."""

import contextlib
import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import cast

from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import StoredTensor
from opt_core.checkpoints.torch_legacy import LEGACY_MAGIC, LegacyFile
from opt_core.checkpoints.torch_pickle import Storage, StorageView, parse_pickle
from opt_core.checkpoints.wrappers import unwrap_state
from opt_core.errors import CheckpointError

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, ..., lengths of the name and the extra field
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"
_MAX_PICKLE = 1 << 24  # opt-175b's would be half a megabyte
_MAX_SMALL_ENTRY = 64


def is_torch_file(path: Path) -> bool:
    """Whether a file is torch's, by its first bytes, or by its name where they do not tell."""
    start = b""
    if path.is_file():
        with contextlib.suppress(OSError), path.open("rb") as file:
            start = file.read(9)
    if start[8:] == b"{":  # of a safetensors file, behind the length of its header
        return False
    return start.startswith((_ZIP_MAGIC, _PICKLE_MAGIC)) or path.suffix == ".bin"


def read_torch_file(path: Path) -> dict[str, StoredTensor]:
    """Reads which tensors a torch file holds, and where; nothing in the file is executed.

    Accepted are a dict of tensors, and one inside what a training checkpoint has around it, under
    "state_dict", "model_state_dict", "model" and the like.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is missing, damaged, compressed, encrypted, big-endian, or holds
            anything that is not a tensor.
    """
    source = TensorFile(path)
    if source.bytes_at(0, len(LEGACY_MAGIC)) == LEGACY_MAGIC:
        archive = LegacyFile(source)
        content = unwrap_state(archive.content)
    else:
        archive = TorchArchive(source)
        content = unwrap_state(parse_pickle(archive.pickle, path))
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path}: expected a dict of tensors, received {type(content).__name__}; re-save it "
            "with torch.save(model.state_dict(), path)"
        )
    tensors: dict[str, StoredTensor] = {}
    for name, value in cast(dict[object, object], content).items():
        if not isinstance(name, str) or not isinstance(value, StorageView):
            raise CheckpointError(
                f"{path}: {name!r}: expected a tensor, received {type(value).__name__}; a weight "
                "file may hold tensors only"
            )
        tensors[name] = archive.tensor(name, value)
    return tensors


class TorchArchive:
    """The zip archive that `torch.save` writes: a file, or a part of one.

    Args:
        source: The open file.
        start: Where the archive begins in it.
        size: Bytes of the archive; None: up to the end.

    Attributes:
        pickle: What describes its contents; nothing of it has been read.

    Raises:
        CheckpointError: It is no such archive, or damaged, compressed, encrypted or big-endian.
    """

    def __init__(self, source: TensorFile, start: int = 0, size: int | None = None) -> None:
        self.source, self.start = source, start
        self.size = source.size - start if size is None else size
        path = source.path
        if source.bytes_at(start, len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            raise CheckpointError(
                f"{path}: written by torch before 1.6 (or without its zip format); re-save it with "
                "torch.save(torch.load(path), path)"
            )
        if source.bytes_at(start, len(_ZIP_MAGIC)) != _ZIP_MAGIC:
            raise CheckpointError(f"{path}: not a torch file: expected a zip archive")
        try:
            with zipfile.ZipFile(_Part(source, start, self.size)) as archive:
                self.entries = {info.filename: info for info in archive.infolist()}
                if len(self.entries) != len(archive.infolist()):
                    raise CheckpointError(f"{path}: an archive entry occurs twice; it is damaged")
                self.root = self._root()
                order = self._small("byteorder", _MAX_SMALL_ENTRY) or b"little"
                if order != b"little":
                    raise CheckpointError(f"{path}: byte order {order!r}; expected b'little'")
                self.pickle = self._small("data.pkl", _MAX_PICKLE)
        except CheckpointError:
            raise
        except (
            zipfile.BadZipFile, RuntimeError, OSError, EOFError, struct.error, ValueError,
            LookupError, OverflowError, MemoryError,
        ) as error:  # fmt: skip
            raise CheckpointError(
                f"{path}: damaged or truncated zip archive ({error}); download it again"
            ) from None

    def _root(self) -> str:
        roots = [name[:-9] for name in self.entries if name.endswith("/data.pkl")]
        if len(roots) != 1 or "/" in roots[0]:
            raise CheckpointError(
                f"{self.source.path}: not a torch file: expected one data.pkl in the archive, "
                f"received {len(roots)}"
            )
        return roots[0]

    def _small(self, name: str, limit: int) -> bytes:
        info = self.entries.get(f"{self.root}/{name}")
        if info is None:
            return b""
        self._check_stored(info)
        if info.file_size > limit:
            raise CheckpointError(
                f"{self.source.path}: {name} has {info.file_size} bytes; expected at most {limit}"
            )
        # Not `archive.read`: how strictly it takes a damaged directory differs between Pythons.
        data = self.source.bytes_at(self._start(info), info.file_size)
        if zlib.crc32(data) != info.CRC:
            raise CheckpointError(
                f"{self.source.path}: {info.filename} differs from its checksum; it is damaged, "
                "download it again"
            )
        return data

    def _check_stored(self, info: zipfile.ZipInfo) -> None:
        if info.flag_bits & 1 or info.compress_type != zipfile.ZIP_STORED:
            kind = "encrypted" if info.flag_bits & 1 else "compressed"
            raise CheckpointError(
                f"{self.source.path}: {info.filename} is {kind}; expected it stored as it is, as "
                "torch.save does"
            )
        if info.compress_size != info.file_size:
            raise CheckpointError(f"{self.source.path}: {info.filename} has two sizes; damaged")

    def tensor(self, name: str, view: StorageView) -> StoredTensor:
        """Where a tensor of the pickle lies.

        Raises:
            CheckpointError: Its storage is missing, or too short for it.
        """
        start, size = self._storage(view.storage)
        dtype = view.storage.dtype
        begin = view.offset * dtype.itemsize
        tensor = StoredTensor(
            name, view.shape, dtype, self.source, start + begin, view.uneven_strides
        )
        if begin + tensor.extent > size:
            raise CheckpointError(
                f"{self.source.path}: {name} reaches byte {begin + tensor.extent} of a storage "
                f"of {size}"
            )
        return tensor

    def _storage(self, storage: Storage) -> tuple[int, int]:
        path = self.source.path
        info = self.entries.get(f"{self.root}/data/{storage.key}")
        if info is None:
            raise CheckpointError(f"{path}: storage {storage.key!r} is missing from the archive")
        self._check_stored(info)
        needed = storage.numel * storage.dtype.itemsize
        if needed > info.file_size:
            raise CheckpointError(
                f"{path}: storage {storage.key!r}: expected {needed} bytes, "
                f"received {info.file_size}"
            )
        return self._start(info), needed

    def _start(self, info: zipfile.ZipInfo) -> int:
        """Where in the file the bytes of an entry begin."""
        path = self.source.path
        at = max(info.header_offset, 0)
        header = self.source.bytes_at(self.start + at, _LOCAL_HEADER.size)
        is_whole = len(header) == _LOCAL_HEADER.size and header.startswith(_ZIP_MAGIC)
        if info.header_offset < 0 or not is_whole:
            raise CheckpointError(f"{path}: {info.filename} is not where the archive says")
        _, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        start = at + _LOCAL_HEADER.size + name_length + extra_length
        if start + info.file_size > self.size:
            raise CheckpointError(f"{path}: {info.filename} reaches past the end of the file")
        return self.start + start


class _Part(io.RawIOBase):
    """Part of an open file, as Python's zipfile wants one."""

    def __init__(self, source: TensorFile, start: int, size: int) -> None:
        self.source, self.start, self.size = source, start, size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        if self.at < 0:
            raise OSError("a place before the start")
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size - self.at)
        data = self.source.bytes_at(self.start + self.at, left if size < 0 else min(size, left))
        self.at += len(data)
        return data
