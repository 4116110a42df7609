"""Folders that appear whole or not at all, even after a kill; one writer at a time."""

import contextlib
import os
import shutil
from collections.abc import Generator
from pathlib import Path

from opt_core.errors import CheckpointError, OPTError


def check_is_new(folder: Path, failure: type[OPTError] = CheckpointError) -> None:
    """Refuses a folder that exists, unless it is empty.

    Raises:
        failure: It exists.
    """
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise failure(f"{folder}: already exists; name a new folder")


@contextlib.contextmanager
def new_folder(folder: Path, failure: type[OPTError] = CheckpointError) -> Generator[Path]:
    """Yields a hidden folder beside the wanted one, which takes its place at the end.

    On an error it is removed. After a kill it stays, hidden, until the next attempt removes it.

    Args:
        folder: The folder to make; its parents are made if missing.
        failure: What to raise, by what the folder is to hold.

    Raises:
        failure: The folder exists and is not empty, another process is making it, or the disk
            refuses.
    """
    folder = Path(os.path.abspath(folder))
    check_is_new(folder, failure)
    stage = folder.parent / f".{folder.name}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if stage.is_symlink() or (stage.exists() and not stage.is_dir()):
            stage.unlink()
        stage.mkdir(exist_ok=True)
        with locked(stage, failure(f"{folder}: another process is writing it")):
            try:
                _clear(stage)
                yield stage
                _flush(stage)
                stage.rename(folder)
                _flush_folder(folder.parent)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OPTError as error:
        if str(stage) not in str(error):
            raise
        # Nobody knows the folder by its hidden name.
        raise type(error)(str(error).replace(str(stage), str(folder))) from None
    except OSError as error:
        raise failure(f"{folder}: cannot be written: {error.strerror or error}") from None


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


def _clear(stage: Path) -> None:
    for path in stage.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _flush(stage: Path) -> None:
    """Waits until the disk has everything, so that no crash leaves a folder of empty files."""
    for path in sorted(stage.rglob("*"), reverse=True):
        if path.is_dir():
            _flush_folder(path)
        elif not path.is_symlink():
            _flush_file(path, os.O_RDWR)
    _flush_folder(stage)


def _flush_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some systems cannot flush a folder
        _flush_file(path, os.O_RDONLY)


def _flush_file(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
