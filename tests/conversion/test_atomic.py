"""Never half a folder: errors, kills, full disks, and two processes at once."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import conversion
from conversion.streaming import background_flush
from conversion.writers import WRITERS
from opt_core.errors import CheckpointError
from tests.support.files.checkpoint_fixtures import TINY
from tests.support.files.format_fixtures import make

ROOT = Path(__file__).parents[2]


KILLED = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import conversion, h5py
from conversion.writers import WRITERS
source, root = Path(sys.argv[1]), Path(sys.argv[2])

def convert(new, to):
    conversion.convert(source, new, to, max_shard_size="5MB")

def files(folder):
    return {p.name: hashlib.sha1(p.read_bytes()).hexdigest() for p in folder.iterdir()}

formats, expected, windows = list(WRITERS), {}, {}
for to in formats:
    start = time.monotonic()
    convert(root / to, to)
    windows[to] = 1.3 * (time.monotonic() - start)
    expected[to] = files(root / to)
random.seed(0)
states = []
# On a machine whose load changes, the time measured above is soon another one: each outcome moves
# the window of its format towards the other outcome, and there are more attempts where one is rare.
while (attempt := len(states)) < 24 or (
    attempt < 400 and min(states.count("whole"), states.count("absent")) < 3
):
    to = formats[attempt % len(formats)]
    new = root / f"new{attempt % 4}"  # where another format was begun
    child = os.fork()
    if not child:
        try:
            convert(new, to)
        finally:
            os._exit(0)
    time.sleep(random.uniform(0, windows[to]))
    os.kill(child, random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    os.waitpid(child, 0)
    if new.exists():
        found = files(new)
        assert found == expected[to], (attempt, to, found)
        for path in new.iterdir():
            path.unlink()
        new.rmdir()
        states.append("whole")
        windows[to] /= 1.5
    else:
        states.append("absent")
        windows[to] *= 1.5
for i in range(4):
    convert(root / f"new{i}", formats[i])
    assert files(root / f"new{i}") == expected[formats[i]]
print(json.dumps([states, sorted(p.name for p in root.iterdir())]))
"""


def test_killed_at_any_moment_the_folder_is_whole_or_absent(tmp_path: Path):
    """Every format in turn; what a killed process left is in nobody's way."""
    config = TINY.replace(hidden_size=256, ffn_dim=1024, vocab_size=4000, num_hidden_layers=3)
    make(tmp_path / "source", config)
    before = {p.name: p.read_bytes() for p in (tmp_path / "source").iterdir()}
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "source"), str(tmp_path / "out")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states, left = json.loads(done.stdout)
    assert min(states.count("whole"), states.count("absent")) > 2, states
    assert left == sorted([*WRITERS, "new0", "new1", "new2", "new3"])
    assert {p.name: p.read_bytes() for p in (tmp_path / "source").iterdir()} == before


FULL = """
import json, resource, signal, sys
from pathlib import Path
import conversion
from conversion.writers import WRITERS
from opt_core.errors import OPTError
source, root = Path(sys.argv[1]), Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
told = {}
for to in WRITERS:
    try:
        conversion.convert(source, root / to, to)
        told[to] = None
    except OPTError as error:
        told[to] = str(error)
print(json.dumps([told, [path.name for path in root.iterdir()]]))
"""


@pytest.mark.parametrize("limit", [3000, 12_000])
def test_a_full_disk_is_one_line_and_leaves_nothing(limit: int, tmp_path: Path):
    make(tmp_path / "a", TINY.replace(hidden_size=32, ffn_dim=128))
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path / "a"), str(tmp_path / "out"), str(limit)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told, left = json.loads(done.stdout)
    assert told.keys() == WRITERS.keys()
    assert not left
    for to, message in told.items():
        assert message.startswith(str(tmp_path / "out" / to)), message
        assert "cannot be written" in message
        assert "\n" not in message


@pytest.mark.skipif(not hasattr(os, "fdatasync"), reason="this system flushes at the end only")
def test_files_are_flushed_while_others_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path / "a")
    monkeypatch.setattr(background_flush, "_EVERY", 1)
    flushed: set[str] = set()

    def note(handle: int) -> None:
        flushed.add(Path(f"/proc/self/fd/{handle}").readlink().name)

    monkeypatch.setattr(os, "fdatasync", note)
    done = conversion.convert(tmp_path / "a", tmp_path / "b", "torch-bin", max_shard_size="2KB")
    assert flushed & done.files.keys()

    def fail(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fdatasync", fail)
    for to in WRITERS:
        with pytest.raises(CheckpointError, match="cannot be written: Input/output error"):
            conversion.convert(tmp_path / "a", tmp_path / "c", to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
