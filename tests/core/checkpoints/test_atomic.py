"""A folder appears whole or not at all, whoever makes it."""

import errno
import os
import stat
from pathlib import Path

import pytest

from opt_core.checkpoints.atomic import new_folder
from opt_core.errors import CheckpointError, ConfigError, DataError, OPTError


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path):
    def fail(stage: Path) -> None:
        (stage / "x").write_text("x")
        raise RuntimeError

    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as stage:
        fail(stage)
    assert not list(tmp_path.iterdir())
    (tmp_path / ".a.partial" / "y").mkdir(parents=True)  # left by a process that was killed
    (tmp_path / ".a.partial" / "x").write_text("half")
    with new_folder(tmp_path / "a") as stage:
        (stage / "z").write_text("whole")
        assert [p.name for p in stage.iterdir()] == ["z"]
        with pytest.raises(CheckpointError, match="another process"), new_folder(tmp_path / "a"):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("kept")
    (tmp_path / ".b.partial").symlink_to(outside)
    with new_folder(tmp_path / "b") as stage:
        (stage / "z").write_text("whole")
    assert (outside / "kept").exists()
    assert [p.name for p in (tmp_path / "b").iterdir()] == ["z"]


@pytest.mark.parametrize("failure", [CheckpointError, DataError])
def test_what_is_there_is_refused_in_the_words_of_what_it_would_hold(
    failure: type[OPTError], tmp_path: Path
):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("x")
    (tmp_path / "b").write_text("a file")
    for name, what in (("a", "already exists"), ("b", "already exists"), ("b/c", "cannot be")):
        with pytest.raises(failure, match=what), new_folder(tmp_path / name, failure):
            pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_disk_that_fails_at_the_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Bytes that are only in the cache when writing ends may turn out not to fit the disk."""
    fsync = os.fsync

    def full(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    with (
        pytest.raises(CheckpointError, match="a: cannot be written: No space left"),
        new_folder(tmp_path / "a") as stage,
    ):
        (stage / "x").write_text("x")
    assert not list(tmp_path.iterdir())


def test_errors_name_the_folder_as_the_user_does(tmp_path: Path):
    def fail(stage: Path) -> None:
        raise ConfigError(f"{stage / 'config.json'}: wrong")

    with pytest.raises(ConfigError) as caught, new_folder(tmp_path / "a") as stage:
        fail(stage)
    assert str(caught.value) == f"{tmp_path / 'a' / 'config.json'}: wrong"
