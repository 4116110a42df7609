"""Where compiled programs are kept; nobody's own settings change. Of their use: test_startup.py."""

import os

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
