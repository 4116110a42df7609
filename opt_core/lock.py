"""One process at a time in a folder."""

import contextlib
import os
from collections.abc import Generator
from pathlib import Path

from opt_core.errors import OPTError


@contextlib.contextmanager
def locked(folder: Path, refusal: OPTError) -> Generator[None]:
    """Holds a folder for the length of the block; the system lets go of it if the process dies.

    Args:
        folder: It is there.
        refusal: What to raise where another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: two processes in one folder at a time are the user's care
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise refusal from None
        yield
    finally:
        os.close(handle)
