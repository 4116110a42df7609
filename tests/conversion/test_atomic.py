"""Never half a folder: errors, kills, full disks, and two processes at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conversion.staging import new_folder
from conversion.targets import TARGETS
from opt_core.errors import CheckpointError
from tests.conversion.checkpoints import make
from tests.core.checkpoint_fixtures import TINY

ROOT = Path(__file__).parents[2]


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


KILLED = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import conversion, h5py
source, root, to = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
start = time.monotonic()
conversion.convert(source, root / "whole", to)
full = time.monotonic() - start
expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (root / "whole").iterdir()}
random.seed(0)
states = []
for attempt in range(20):
    new = root / f"new{attempt % 3}"
    child = os.fork()
    if not child:
        try:
            conversion.convert(source, new, to)
        finally:
            os._exit(0)
    time.sleep(random.uniform(0, 1.3 * full))
    os.kill(child, random.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
    os.waitpid(child, 0)
    if new.exists():
        found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in new.iterdir()}
        assert found == expected, (attempt, found)
        for path in new.iterdir():
            path.unlink()
        new.rmdir()
        states.append("whole")
    else:
        states.append("absent")
for i in range(3):
    conversion.convert(source, root / f"new{i}", to)
print(json.dumps([states, sorted(p.name for p in root.iterdir())]))
"""


@pytest.mark.parametrize("to", ["safetensors", "flax-msgpack"])
def test_killed_at_any_moment_the_folder_is_whole_or_absent(to: str, tmp_path: Path):
    config = TINY.replace(hidden_size=256, ffn_dim=1024, vocab_size=4000, num_hidden_layers=6)
    make(tmp_path / "source", config)
    before = {p.name: p.read_bytes() for p in (tmp_path / "source").iterdir()}
    (tmp_path / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "source"), str(tmp_path / "out"), to],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    states, left = json.loads(done.stdout)
    assert set(states) == {"whole", "absent"}
    assert left == ["new0", "new1", "new2", "whole"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "source").iterdir()} == before


FULL = """
import json, resource, signal, sys
from pathlib import Path
import conversion
from conversion.targets import TARGETS
from opt_core.errors import OPTError
source, root = Path(sys.argv[1]), Path(sys.argv[2])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
told = {}
for to in TARGETS:
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
    assert told.keys() == TARGETS.keys()
    assert not left
    for to, message in told.items():
        assert message.startswith(str(tmp_path / "out" / to)), message
        assert "cannot be written" in message
        assert "\n" not in message
