"""A weight file and its memory map: views of it, and what the system is told about its pages."""

import mmap
import os
import sys
import threading
import weakref
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import CheckpointError
from opt_core.json_files import LFS_POINTER

_START = 64  # bytes that tell a text, such as a server's refusal, from any weight file
_TEXT = bytes([*range(32, 127), *b"\t\r\n"])
_LINUX_MAP_NORESERVE = 0x4000  # named in Python's mmap module since 3.13
_SYS = Path("/sys")
_LEAST_WINDOW = 1 << 17  # Linux' own default


class TensorFile:
    """An open weight file and its copy-on-write memory map.

    The map belongs to the file that was opened: replacing the file later does not change what is
    read here. Pages that no array views any more are given back to the system, so a loader that
    copies tensor after tensor never holds the whole file in memory.

    Args:
        path: File to map.

    Raises:
        CheckpointError: The file is missing, empty, not a regular file, or a Git LFS pointer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.exists() and not path.is_file():
                raise CheckpointError(f"{path}: expected a weight file, received something else")
            with path.open("rb") as file:
                self.size = file.seek(0, 2)
                self._identity = _identity(file.fileno())
                if self.size == 0:
                    raise CheckpointError(f"{path}: the file is empty; download it again")
                self._map = _map_copy_on_write(file.fileno(), self.size)
        except FileNotFoundError:
            hint = " (a link that leads nowhere)" if path.is_symlink() else ""
            raise CheckpointError(f"{path}: no such file{hint}") from None
        except (OSError, ValueError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: cannot be read: {error}") from None
        self._lock = threading.RLock()
        self._viewed: dict[object, tuple[int, int]] = {}
        self._descriptor: int | None = None
        if self._map[: len(LFS_POINTER)] == LFS_POINTER:
            raise CheckpointError(
                f"{path}: a Git LFS pointer, not the weights; run `git lfs pull` in its folder"
            )
        start = self._map[:_START]
        if start.isascii() and not start.translate(None, _TEXT):
            line = start.decode().strip().partition("\n")[0][:60]
            raise CheckpointError(
                f"{path}: a text that begins with {line!r}, not weights; download it again"
            )

    def bytes_at(self, offset: int, length: int) -> bytes:
        """A copy of part of the file (shorter at its end)."""
        return self._map[offset : offset + length]

    def view(self, start: int, stop: int) -> NDArray[np.uint8]:
        """The bytes from `start` to `stop`; writing to them never reaches the file."""
        with self._lock:
            array = np.frombuffer(self._map, np.uint8, stop - start, start)
            key = object()
            self._viewed[key] = (start, stop)
            weakref.finalize(array, self._release, key).atexit = False
        return array

    def _release(self, key: object) -> None:
        with self._lock:
            start, stop = _whole_pages(*self._viewed.pop(key))
            # Only whole pages that nobody else looks at: dropping a page also drops what its
            # holder wrote to it.
            if not any(a < stop and start < b for a, b in self._viewed.values()):
                self._unmap(start, stop)

    def _unmap(self, start: int, stop: int) -> None:
        if start < stop and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def prefetch(self, start: int, stop: int) -> None:
        """Has the system read part of the file into its memory, as fast as the disk can.

        It returns when all is asked for, and most of it is there.
        """
        if (file := self._file()) is None:
            return
        # Linux reads no more for a call than it would read ahead by itself.
        step = _window(self._identity[0])
        for offset in range(start, stop, step):
            length = min(step, stop - offset)
            os.posix_fadvise(file, offset, length, os.POSIX_FADV_WILLNEED)

    def drop(self, start: int, stop: int) -> None:
        """Gives the memory of part of the file back to the system, whoever views it.

        The next look reads the file again; what was written to the views there is lost.
        """
        self._unmap(*_whole_pages(start, stop))
        if (file := self._file()) is not None:
            os.posix_fadvise(file, start, stop - start, os.POSIX_FADV_DONTNEED)

    def expect_single_rows(self, start: int, stop: int) -> None:
        """Has the system read no more than the pages that are looked at, where nothing is asked."""
        start, stop = start - start % mmap.PAGESIZE, min(stop + -stop % mmap.PAGESIZE, self.size)
        if hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM, start, stop - start)

    def _file(self) -> int | None:
        """A descriptor to advise the system by; None where that cannot be, or the file is new."""
        if not hasattr(os, "posix_fadvise"):
            return None
        with self._lock:
            if self._descriptor is None:
                try:
                    file = os.open(self.path, os.O_RDONLY)
                except OSError:
                    return None
                if _identity(file) != self._identity:
                    os.close(file)
                    return None
                self._descriptor = file
                weakref.finalize(self, os.close, file).atexit = False
        return self._descriptor


def _identity(file: int) -> tuple[int, int]:
    status = os.fstat(file)
    return status.st_dev, status.st_ino


def _whole_pages(start: int, stop: int) -> tuple[int, int]:
    return start + -start % mmap.PAGESIZE, stop - stop % mmap.PAGESIZE


@cache
def _window(device: int) -> int:
    """Bytes that Linux reads ahead at most on a device."""
    name = f"{os.major(device)}:{os.minor(device)}"
    disk = (_SYS / "dev/block" / name).resolve()  # or a part of it, whose folder lies in the disk's
    for folder in (disk / "queue", disk.parent / "queue", _SYS / "class/bdi" / name):
        try:
            return max(_LEAST_WINDOW, int((folder / "read_ahead_kb").read_text()) << 10)
        except (OSError, ValueError):
            continue
    return _LEAST_WINDOW


def _map_copy_on_write(file: int, size: int) -> mmap.mmap:
    if sys.platform != "linux":
        return mmap.mmap(file, size, access=mmap.ACCESS_COPY)
    # Without NORESERVE, Linux refuses to map a file larger than memory: it counts the whole map as
    # pages that might be written to.
    flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", _LINUX_MAP_NORESERVE)
    return mmap.mmap(file, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
