"""Flushes files in the background while more is written: little is left to wait for at the end."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

_EVERY = 1 << 26
_SUPPORTED = hasattr(os, "fdatasync")


class BackgroundFlusher:
    """Flushes the files of a folder in a thread of its own, again and again.

    Args:
        folder: The folder; files may come, grow and be renamed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._waiting = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def wrote(self, nbytes: int) -> None:
        """Notes that some bytes more are to be flushed.

        Raises:
            OSError: The disk could not write those that were.
        """
        self._waiting += nbytes
        if self._running is not None and self._running.done():
            self._running.result()
            self._running = None
        if _SUPPORTED and self._running is None and self._waiting >= _EVERY:
            self._waiting = 0
            self._running = self._pool.submit(_flush, self._folder)

    def finish(self) -> None:
        """Waits for what is under way; raises as `wrote` does."""
        if self._running is not None:
            self._running.result()


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        try:
            file = os.open(path, os.O_RDWR)
        except (FileNotFoundError, IsADirectoryError):  # renamed meanwhile; the tokenizer's
            continue
        try:
            os.fdatasync(file)
        finally:
            os.close(file)
