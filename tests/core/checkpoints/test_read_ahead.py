"""Reading ahead: what belongs together, what stays, and what the system is told."""

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from opt_core.checkpoints import read_ahead, tensor_file
from opt_core.checkpoints.read_ahead import ReadAhead
from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import StoredTensor

PAGE = mmap.PAGESIZE


@pytest.fixture
def file(tmp_path: Path) -> TensorFile:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(64 * PAGE))
    return TensorFile(path)


def stored(file: TensorFile, start: int, stop: int) -> StoredTensor:
    return StoredTensor("w", (stop - start,), np.dtype(np.uint8), file, start)


def resident(file: TensorFile) -> int:
    """Bytes of a file's map that this process has in memory."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(file.path)):
            return next(int(part.split()[1]) * 1024 for part in lines if part.startswith("Rss:"))
    raise AssertionError("it is not mapped")


@pytest.mark.parametrize("room", [-1, 0, 5, 20, 41, 60, 99, 100, 1e9])
def test_parts_that_stay_fit_and_lie_at_even_distances(file: TensorFile, room: float):
    sizes = [10, 10, 10, 10, 10, 10, 10, 10, 20]
    parts = [[stored(file, 0, size)] for size in sizes]
    reader = ReadAhead(parts, room)
    kept = sum(sizes[number] for number in reader.kept)
    assert kept <= max(0, room)
    assert kept > min(100, room) - 20
    assert reader.bytes_per_pass == 100 - kept
    if room == 41:
        assert np.diff(sorted(reader.kept)).max() <= 3


def test_neighbours_are_read_together_and_distant_tensors_apart(file: TensorFile, monkeypatch):
    monkeypatch.setattr(read_ahead, "_GAP", 10)
    tensors = [stored(file, 500, 600), stored(file, 0, 100), stored(file, 110, 200)]
    assert read_ahead._spans(tensors) == [(file, 0, 200), (file, 500, 600)]


def test_parts_are_read_one_ahead_and_dropped(file: TensorFile, monkeypatch):
    told: list[tuple[str, int]] = []
    for name in ("prefetch", "drop"):
        monkeypatch.setattr(
            TensorFile, name, lambda _, start, stop, name=name: told.append((name, start // PAGE))
        )
    reader = ReadAhead([[stored(file, i * PAGE, (i + 1) * PAGE)] for i in range(3)], 0)
    for part in (0, 1, 2, 0, 2):  # the last one out of turn
        reader.enter(part)
        assert ("prefetch", part) in told
        reader.leave(part)
    assert [part for what, part in told if what == "drop"] == [0, 1, 2, 0, 2]
    reader._reader.shutdown()
    assert [part for what, part in told if what == "prefetch"] == [0, 1, 2, 0, 1, 2, 0]


def test_the_system_is_asked_for_no_more_at_once_than_it_reads(file: TensorFile, monkeypatch):
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(tensor_file, "_window", lambda device: 8 * PAGE)
    monkeypatch.setattr(os, "posix_fadvise", lambda _, *advice: asked.append(advice))
    file.prefetch(PAGE, 20 * PAGE)
    wanted = os.POSIX_FADV_WILLNEED
    assert asked == [
        (PAGE, 8 * PAGE, wanted), (9 * PAGE, 8 * PAGE, wanted), (17 * PAGE, 3 * PAGE, wanted),
    ]  # fmt: skip


def test_dropped_pages_are_read_again(file: TensorFile):
    view = file.view(0, 64 * PAGE)
    before = view.copy()
    file.prefetch(0, 64 * PAGE)
    assert resident(file) == 64 * PAGE
    file.drop(8 * PAGE + 1, 40 * PAGE + 1)
    assert resident(file) == (64 - 31) * PAGE
    np.testing.assert_array_equal(view, before)
    file.expect_single_rows(3, 64 * PAGE)
    file.drop(0, 64 * PAGE)
    np.testing.assert_array_equal(view, before)


def test_a_file_that_was_replaced_is_not_advised(file: TensorFile, monkeypatch):
    before, asked = file.view(0, PAGE).copy(), []
    other = file.path.with_name("other")
    other.write_bytes(bytes(64 * PAGE))
    other.replace(file.path)
    monkeypatch.setattr(os, "posix_fadvise", lambda *advice: asked.append(advice))
    file.prefetch(0, PAGE)
    file.drop(0, PAGE)
    np.testing.assert_array_equal(file.view(0, PAGE), before)
    file.path.unlink()
    file.prefetch(0, PAGE)
    assert asked == []


@pytest.mark.parametrize("place", ["disk", "part of a disk", "no disk", "nowhere"])
def test_how_far_a_disk_reads_ahead(tmp_path: Path, monkeypatch, place: str):
    folders = {
        "disk": "dev/block/8:1/queue", "part of a disk": "devices/sda/queue",
        "no disk": "class/bdi/8:1", "nowhere": "else",
    }  # fmt: skip
    if place == "part of a disk":
        (tmp_path / "devices/sda/sda1").mkdir(parents=True)
        (tmp_path / "dev/block").mkdir(parents=True)
        (tmp_path / "dev/block/8:1").symlink_to(tmp_path / "devices/sda/sda1")
    (tmp_path / folders[place]).mkdir(parents=True)
    (tmp_path / folders[place] / "read_ahead_kb").write_text("512\n")
    monkeypatch.setattr(tensor_file, "_SYS", tmp_path)
    expected = 1 << 17 if place == "nowhere" else 512 << 10
    assert tensor_file._window.__wrapped__(os.makedev(8, 1)) == expected
