"""Mishaps of users at the command line, each once."""

import builtins
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from opt_cli import backends
from opt_cli.main import main
from opt_core.data import TokenBlocks, write_blocks
from opt_core.training import read_metrics
from opt_torch.trainer import Trainer
from tests.support.files.tiny_folder import save_model

ROOT = Path(__file__).parents[2]
SETTINGS = ("--sequence-length", 16, "--batch-size", 2, "--max-steps", 2, "--save-every", 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path):
    ids = np.random.default_rng(0).integers(3, 60, 400)
    write_blocks(tmp_path / "data", [ids], 16, 60)
    return tmp_path / "data"


def test_tensorboard_writes_beside_a_new_run(opt_lm, tiny, data, tmp_path, monkeypatch):
    """Its writer makes the run's folder, which then was no new one."""
    scalars = []

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = Path(folder)
            self.folder.mkdir(parents=True)

        def add_scalar(self, name, value, step):
            scalars.append((name, step))

        def close(self):
            (self.folder / "events").touch()

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=SummaryWriter))
    run = tmp_path / "run"
    done = opt_lm("train", tiny, data, "--out", run, "--tensorboard", *SETTINGS)
    assert done.code == 0, done.err
    assert ("loss", 2) in scalars
    assert (run / "tensorboard" / "events").exists()


def test_a_run_that_fails_before_its_first_step_leaves_nothing(opt_lm, tiny, tmp_path, monkeypatch):
    run, text = tmp_path / "run", tmp_path / "text.txt"
    text.write_text("\n".join(f"Dog {i} likes {i * i}, not {i * 7}." for i in range(99)))
    arguments = ("train", tiny, text, "--out", run, *SETTINGS)

    def fail(*_):
        raise MemoryError("too large")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", fail)
        with pytest.raises(MemoryError):
            opt_lm(*arguments)
    assert not run.exists()
    assert opt_lm(*arguments, "--eval-every", 1).err.startswith("error: ")  # nothing to hold out
    assert not run.exists()
    run.mkdir()
    (run / "notes").touch()
    assert "already exists; --resume goes on with it" in opt_lm(*arguments).err
    (run / "notes").unlink()
    assert opt_lm(*arguments).code == 0  # an empty folder is a new one
    assert len(read_metrics(run)) == 2


def test_an_interrupted_run_says_how_to_go_on(opt_lm, tiny, data, tmp_path, monkeypatch):
    run, step = tmp_path / "run", Trainer.step
    arguments = ("train", tiny, data, "--out", run, *SETTINGS)

    def interrupted(self, batch, number):
        if number == 1:
            raise KeyboardInterrupt
        return step(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        done = opt_lm(*arguments)
    assert done.code == 130
    told = "interrupted; the same command with --resume goes on after step 1\n"
    assert done.err.endswith(told)
    assert opt_lm(*arguments, "--resume").code == 0


def test_one_text_file_is_prepared_by_default(opt_lm, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"Line {i} of {i * i} is not line {i * 7}." for i in range(300)))
    done = opt_lm("prepare", text, tmp_path / "out", "--sequence-length", 64, "--json")
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert {*report["splits"]} == {"train"}
    assert report["splits"]["train"]["documents"] == 1
    assert len(TokenBlocks.open(tmp_path / "out" / "train")) == report["splits"]["train"]["blocks"]
    assert not (tmp_path / "out" / "validation").exists()
    asked = opt_lm("prepare", text, tmp_path / "no", "--validation", 0.5, "--sequence-length", 64)
    assert "none of 1 documents fell on this side" in asked.err
    done = opt_lm("prepare", text, tmp_path / "told", "--sequence-length", 64, "--processes", 1)
    assert "nothing is held out for validation" in done.err


@pytest.mark.parametrize("task", ["text", "classification", "qa"])
@pytest.mark.parametrize("place", ["data", "validation"])
def test_a_missing_file_is_called_that(opt_lm, tiny, data, tmp_path, task, place):
    gone = tmp_path / "gone.txt"
    given = (gone,) if place == "data" else (data, "--validation", gone)
    done = opt_lm("train", tiny, *given, "--task", task, "--out", tmp_path / "run")
    assert (done.code, done.err) == (2, f"error: {gone}: no such file or folder\n")
    assert not (tmp_path / "run").exists()


def test_help_shows_the_names_of_extras(opt_lm):
    shown = " ".join(opt_lm("eval", "harness", "--help").out.split())
    assert "pip install 'opt-lm[lm-eval]'" in shown


def test_it_runs_where_stdout_is_no_file(monkeypatch):
    """A notebook's stdout can be written to, and little else."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert (end.value.code, err.getvalue()) == (0, "")
    assert out.getvalue().startswith("opt-lm ")
    monkeypatch.setattr(builtins, "__IPYTHON__", True, raising=False)
    assert main(["info", "mini"]) is None  # or the notebook would show an exception
    assert "layers: norms" in out.getvalue()
    with pytest.raises(SystemExit):
        main(["info", "nowhere"])
    assert err.getvalue().startswith("error: ")


def test_temperature_0_points_to_greedy(opt_lm, tiny):
    for choice in ((), ("--do-sample",)):
        done = opt_lm("generate", "dog", "--model", tiny, "--temperature", 0, *choice)
        told = "error: --temperature 0: for the likeliest token each time, --greedy\n"
        assert (done.code, done.err) == (2, told)
    arguments = ("generate", "dog", "--model", tiny, "--greedy", "-n", 3)
    assert opt_lm(*arguments, "--temperature", 0).out == opt_lm(*arguments).out


def test_the_backend_is_one_that_is_installed(monkeypatch, capsys):
    assert backends.chosen("auto") == "torch"
    assert capsys.readouterr().err == ""
    for there, expected in (("tensorflow", "tf"), ("flax", "flax")):
        with monkeypatch.context() as patch:
            patch.setattr(backends, "find_spec", lambda name, there=there: name == there or None)
            assert backends.chosen("auto") == expected
            assert backends.chosen("torch") == "torch"
        assert capsys.readouterr().err == f"backend: {expected}; torch is not installed\n"


def run_beside(folder, code):
    """A process that finds the modules of a folder before others of their names."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder, env={**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip


def test_tensorflow_says_nothing_while_it_loads(tmp_path):
    """A stand-in for it writes to file descriptor 2, as TensorFlow does, and not by Python."""
    (tmp_path / "opt_tf").mkdir()
    (tmp_path / "opt_tf" / "__init__.py").write_text(
        "import os\nos.write(2, b'I0000 chatter')\nTFOPTForCausalLM = 5\n"
    )
    code = (
        "import sys; from opt_cli.backends import load_backend\n"
        "assert load_backend('tf') == 5; print('heard', file=sys.stderr)"
    )
    assert run_beside(tmp_path, code).stderr == "heard\n"


def test_tensorflow_finds_no_libraries_that_it_can_do_without(tmp_path):
    """A stand-in for opt_tf looks for one as Keras does; afterwards it is there again."""
    for name in ("pandas", "jax"):  # the second is imported already: it stays
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "opt_tf.py").write_text(
        "try:\n    import pandas\nexcept ImportError:\n    pandas = None\n"
        "import jax\nTFOPTForCausalLM = pandas, jax\n"
    )
    code = (
        "import jax; from opt_cli.backends import load_backend\n"
        "assert load_backend('tf') == (None, jax); import pandas; print(pandas.__file__)"
    )
    assert run_beside(tmp_path, code).stdout == f"{tmp_path / 'pandas.py'}\n"


def test_the_flax_extra_has_what_its_export_needs():
    """TensorFlow brings flatbuffers too, and JAX does not ask for it."""
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(name.startswith("flatbuffers") for name in extras["optional-dependencies"]["flax"])
