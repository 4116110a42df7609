"""A folder that appears whole or not at all, even if the process is killed while it is written."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from opt_core.errors import DataError


@contextlib.contextmanager
def new_folder(folder: Path) -> Generator[Path]:
    """Yields a hidden folder beside the wanted one, which takes its place at the end.

    On an error it is removed. After a kill it stays, hidden, until the next attempt removes it.

    Args:
        folder: The folder to make; its parents are made if missing.

    Raises:
        DataError: The folder exists and is not empty, or the disk refuses.
    """
    folder = Path(os.path.abspath(folder))
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder}: already exists; name a new folder")
    stage = folder.parent / f".{folder.name}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove(stage)
        stage.mkdir()
        try:
            yield stage
            for path in [*sorted(stage.rglob("*"), reverse=True), stage]:
                _flush(path)
            stage.rename(folder)
            _flush(folder.parent)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written: {error.strerror or error}") from None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Waits until the disk has it, so that no crash leaves a folder of empty files."""
    with contextlib.suppress(OSError):  # some systems cannot flush a folder
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
