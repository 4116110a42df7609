"""Programs kept on disk: a second process compiles nothing, and nobody's own settings change."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opt_cli.compilation_cache import keep_programs, programs_folder

NAMES = ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "TF_XLA_FLAGS")


@pytest.fixture
def nothing_set(monkeypatch, tmp_path):
    for name in (*NAMES, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.setenv(name, "")  # so that it is as it was, afterwards
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_folders_are_in_the_users_cache(nothing_set, tmp_path):
    keep_programs()
    folder = programs_folder()
    assert folder.is_relative_to(tmp_path / "opt-lm" / "programs")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder / "jax")
    assert f"--tf_xla_persistent_cache_directory={folder}" in os.environ["TF_XLA_FLAGS"]


def test_what_is_set_already_stays(nothing_set, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    monkeypatch.setenv("TF_XLA_FLAGS", "--mine")
    keep_programs()
    assert [os.environ.get(name) for name in NAMES] == ["mine", None, "--mine"]


def test_a_cache_that_cannot_be_written_is_left_alone(nothing_set, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_programs()
    assert "TF_XLA_FLAGS" not in os.environ


@pytest.mark.parametrize("backend", ["flax", pytest.param("tf", marks=pytest.mark.slow)])
def test_a_second_process_finds_the_programs_of_the_first(
    nothing_set, monkeypatch, tmp_path, backend
):
    # All are kept: which of them take a tenth of a second depends on the machine's load.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    command = [sys.executable, "-m", "opt_cli", "generate", "A", "-n", "2", "--backend", backend]
    command += ["--seed", "1"]
    texts, files = [], []
    for _ in range(2):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        texts.append(done.stdout)
        files.append({p: p.stat().st_mtime_ns for p in programs(tmp_path)})
    assert texts[0] == texts[1]
    assert files[0]
    assert files[0] == files[1]


def programs(folder: Path) -> list[Path]:
    """Files with a program in them; JAX notes beside each when it was read last."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return [p for p in found if not p.name.endswith(("-atime", ".lockfile"))]
