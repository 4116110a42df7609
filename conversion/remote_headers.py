"""Checkpoints on the hub, described without downloading them: only headers are fetched.

The headers are written where they belong into files of the right length but without data (sparse:
they take no room), which the ordinary readers then read.
"""

import contextlib
import io
import struct
import tempfile
import zipfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import BinaryIO, cast

from conversion.formats.flax_msgpack import walk_flax
from conversion.formats.hdf5 import read_hdf5_headers
from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.errors import CheckpointError
from opt_core.hub import RemoteFiles, model_files, resolve
from opt_core.json_files import parse_json_object

_BLOCK = 1 << 16
_MAX_HEADER = 100_000_000
_MAX_PICKLE = 1 << 24
_MAX_BLOCKS = 1 << 12  # opt-175b as one Flax file would need 1,600
_LOCAL_HEADER = struct.Struct("<4s22xHH")


@contextlib.contextmanager
def download_headers(remote: RemoteFiles) -> Generator[Path]:
    """Yields a folder that looks like the repository's, with no more than the headers of weights.

    Args:
        remote: From `opt_core.hub.remote_files`.

    Raises:
        CheckpointError: The repository holds no model, or the hub gives no parts of files.
    """
    names = model_files(remote.sizes, remote.name, convertible=True)
    small = tuple(name for name in names if Path(name).suffix not in _HEADER_READERS)
    known = resolve(remote.name, files=small, revision=remote.revision, token=remote.token)
    with tempfile.TemporaryDirectory(prefix="opt-lm-") as scratch:
        folder = Path(scratch)
        for name in small:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((known / name).read_bytes())
        for name in set(names) - set(small):
            try:
                with (folder / name).open("w+b") as file:
                    file.truncate(remote.sizes[name])
                    _HEADER_READERS[Path(name).suffix](_Ranges(remote, folder / name, file))
            except OSError as error:
                raise CheckpointError(f"{remote.name}: {name}: {error.strerror or error}") from None
        yield folder


class _Ranges(io.RawIOBase):
    """A remote file as Python's zipfile wants one: what is read is kept in the sparse file."""

    def __init__(self, remote: RemoteFiles, path: Path, file: BinaryIO) -> None:
        self.remote, self.path, self.file = remote, path, file
        self.size = remote.sizes[path.name]
        self.at = 0
        self.have: set[int] = set()
        self.failure: CheckpointError | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        stop = self.size if size < 0 else min(self.size, self.at + size)
        if stop - self.at > _MAX_HEADER:
            raise CheckpointError(
                f"{self.remote.name}: {self.path.name}: header of {stop - self.at} bytes"
            )
        missing = [n for n in range(self.at // _BLOCK, -(-stop // _BLOCK)) if n not in self.have]
        if missing and self.at < stop:
            start, end = missing[0] * _BLOCK, min(self.size, (missing[-1] + 1) * _BLOCK)
            self.file.seek(start)
            self.file.write(self._fetch(start, end))
            self.have.update(range(missing[0], missing[-1] + 1))
        self.file.seek(self.at)
        data = self.file.read(max(0, stop - self.at))
        self.at += len(data)
        return data

    def _fetch(self, start: int, end: int) -> bytes:
        try:
            if len(self.have) > _MAX_BLOCKS:
                what = f"its header is spread over more than {_MAX_BLOCKS} places"
                raise CheckpointError(f"{self.remote.name}: {self.path.name}: {what}")
            return self.remote.read(self.path.name, start, end)
        except CheckpointError as error:
            self.failure = error
            raise

    def bytes_at(self, offset: int, length: int) -> bytes:
        """As `TensorFile` has it, for readers that need no more of one."""
        self.seek(offset)
        return self.read(length)


def _safetensors(ranges: _Ranges) -> None:
    """The header, and the small tensors that say of which shape quantised weights are."""
    length = int.from_bytes(ranges.read(8), "little")
    text = ranges.read(min(length, ranges.size))
    try:
        header = parse_json_object(text, ranges.path, CheckpointError)
        for name, entry in header.items():
            if name.endswith(".weight_shape") or ".quant_state." in name:
                begin, end = entry["data_offsets"]
                ranges.seek(8 + length + begin)
                ranges.read(min(end - begin, _BLOCK))
    except (CheckpointError, KeyError, TypeError, ValueError):
        if ranges.failure is not None:
            raise


def _torch(ranges: _Ranges) -> None:
    """The directory at the end, the pickle, and local headers made up from the directory.

    Real ones lie between the tensors, a request each; they say nothing that is needed here.
    """
    try:
        with zipfile.ZipFile(ranges) as archive:
            entries = archive.infolist()
            for info in entries:
                if info.filename.endswith(("/data.pkl", "/byteorder")):
                    if info.file_size > _MAX_PICKLE:
                        return  # the reader says what is wrong with it
                    archive.read(info)
    except (zipfile.BadZipFile, EOFError, struct.error, ValueError, RuntimeError, LookupError):
        return
    for info in entries:
        if info.header_offset // _BLOCK not in ranges.have and info.header_offset >= 0:
            ranges.file.seek(info.header_offset)
            ranges.file.write(_LOCAL_HEADER.pack(b"PK\x03\x04", 0, 0))


def _msgpack(ranges: _Ranges) -> None:
    """The headers in front of each array: a request for each large one."""
    try:
        walk_flax(cast(TensorFile, ranges))
    except CheckpointError:
        if ranges.failure is not None:
            raise


def _hdf5(ranges: _Ranges) -> None:
    """The parts of the file that the HDF5 library looks at."""
    read_hdf5_headers(ranges.path, ranges.size, ranges.bytes_at)


_HEADER_READERS: dict[str, Callable[[_Ranges], None]] = {
    ".safetensors": _safetensors,
    ".bin": _torch,
    ".msgpack": _msgpack,
    ".h5": _hdf5,
}
