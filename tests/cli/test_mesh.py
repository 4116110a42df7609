"""`--mesh`: one command in several processes, to the same numbers; lost ones; `opt-lm plan`."""

import json
import signal
import time

import numpy as np
import pytest

pytest.importorskip("torch")

from opt_core.data import write_blocks
from opt_core.training.run_folder import read_metrics
from tests.support.files.tiny_folder import save_model
from tests.support.ranks import free_port, run_ranks

CLOSE = 1e-5
"""Losses of a run on a mesh and of one process, or of another mesh."""

MINUTE = 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def command(tiny, tmp_path_factory):
    """A training's arguments, but for the run's folder and the mesh."""
    data = tmp_path_factory.mktemp("data")
    ids = np.random.default_rng(0).integers(3, 60, 400)
    for name in ("train", "validation"):
        write_blocks(data / name, [ids], 16, 60)
    values = ["train", tiny, data, "--batch-size", 4, "--sequence-length", 16, "--save-every", 2,
              "--eval-every", 3, "--eval-batches", 2, "--dropout", 0, "--attention-dropout", 0,
              "--learning-rate", "1e-3", "--lr-schedule", "constant"]  # fmt: skip
    return [str(value) for value in values]


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    """The metrics of six steps in one process, by backend."""
    found = {}

    def get(backend, opt_lm):
        if backend not in found:
            out = tmp_path_factory.mktemp("alone") / "run"
            code, _, err = opt_lm(*command, "--backend", backend, "--out", out, "--max-steps", 6)
            assert code == 0, err
            found[backend] = figures(out)
        return found[backend]

    return get


def figures(run):
    """Losses, gradients' norms and validation losses of a run, step by step."""
    return [
        [record["step"], record.get("loss"), record.get("grad_norm"), record.get("eval_loss")]
        for record in read_metrics(run)
    ]


def same(ours, theirs):
    values = [np.array(x, float) for x in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=0, atol=CLOSE)


def test_two_processes_train_as_one_and_one_goes_on(opt_lm, command, alone, tmp_path):
    out = tmp_path / "run"
    given = [*command, "--backend", "torch", "--out", str(out)]
    ranks = run_ranks("opt_cli", 2, [*given, "--max-steps", "4", "--mesh", "fsdp=2"], tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    assert "4 steps" in ranks[0].told
    assert not ranks[1].told.strip()
    parts = sorted((out / "checkpoints" / "step-00000004" / "parts").iterdir())
    assert len(parts) == 2
    code, _, err = opt_lm(*given, "--max-steps", 6, "--resume")
    assert code == 0, err
    done = alone("torch", opt_lm)
    wanted = [row for row in done if row[0] <= 4 or row[3] is None or row[0] == 6]
    ours = [row for row in figures(out) if not (row[0] == 4 and row[3])]  # its end was validated
    same(ours, wanted)
    assert (out / "model" / "tokenizer_config.json").exists()


@pytest.mark.slow
def test_adapters_and_another_mesh(opt_lm, command, tmp_path):
    """From one process' checkpoint, which lies in one file, to two of other kinds."""
    runs = []
    for name, meshes in (("plain", ("", "", "")), ("spread", ("", "model=2", "data=2"))):
        out, steps = tmp_path / name, 0
        given = [*command, "--backend", "torch", "--out", str(out), "--lora-rank", "2"]
        for mesh in meshes:
            steps += 2
            arguments = [*given, "--max-steps", str(steps), "--resume"]
            if mesh:
                ranks = run_ranks("opt_cli", 2, [*arguments, "--mesh", mesh], tmp_path)
                assert [rank.code for rank in ranks] == [0, 0], ranks
            else:
                assert opt_lm(*arguments)[0] == 0
        runs.append(out)
    same(*(figures(run) for run in runs))
    ours, theirs = (
        sorted(path.relative_to(run) for path in (run / "adapter").iterdir()) for run in runs
    )
    assert ours == theirs


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_run(command, tmp_path, victim):
    out, since = tmp_path / "run", []

    def kill(processes):
        while len(figures(out)) < 4 and all(p.poll() is None for p in processes):
            time.sleep(0.1)
        processes[victim].send_signal(signal.SIGKILL)
        since.append(time.monotonic())

    given = [*command, "--backend", "torch", "--out", str(out), "--max-steps", "4000"]
    ranks = run_ranks("opt_cli", 2, [*given, "--mesh", "fsdp=2"], tmp_path, 300, kill)
    assert time.monotonic() - since[0] < MINUTE
    assert ranks[victim].code == -signal.SIGKILL
    other = ranks[1 - victim]
    assert other.code == 2
    (line,) = [line for line in other.told.splitlines() if line.startswith("error:")]
    assert f"process {1 - victim} of 2: lost connection, gone: process {victim};" in line
    assert "--resume" in line


@pytest.mark.slow
def test_every_process_refuses_alike(command, tmp_path):
    """A mesh that does not fit, and rows that it cannot share; nothing is written."""
    out = tmp_path / "run"
    given = [*command, "--backend", "torch", "--out", str(out), "--max-steps", "4"]
    ranks = run_ranks("opt_cli", 2, [*given, "--mesh", "data=2", "--batch-size", "3"], tmp_path)
    told = "error: --batch-size: 3 rows cannot be shared by data x fsdp = 2 devices in 1 equal"
    for rank in ranks:
        assert rank.code == 2
        assert rank.told.count("error:") == 1
        assert told in rank.told
    assert not out.exists()


@pytest.mark.parametrize(
    ("backend", "mesh", "told"),
    [
        ("torch", "model=2", r"mesh: data=1 x fsdp=1 x model=2 needs 2 devices, received 1"),
        ("torch", "heads=2", "mesh: expected sizes such as data=2,fsdp=2,model=4"),
        ("tf", "model=2", "TensorFlow splits batches only (data=N)"),
        ("tf", "data=64", "needs 64 devices, received 1"),
        ("flax", "model=64", "needs 64 devices, received 8"),
    ],
)
def test_meshes_that_do_not_fit(opt_lm, command, tmp_path, backend, mesh, told):
    pytest.importorskip("tensorflow" if backend == "tf" else backend)
    code, out, err = opt_lm(
        *command, "--backend", backend, "--out", tmp_path / "run", "--mesh", mesh
    )
    assert (code, out) == (2, "")
    assert told in err
    assert not (tmp_path / "run").exists()


def test_processes_without_a_mesh_are_told_of_it(opt_lm, command, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    given = [*command, "--backend", "torch", "--out", tmp_path / "run"]
    code, _, err = opt_lm(*given)
    assert code == 2
    assert "2 processes, and no --mesh to say how they share the work" in err
    code, _, err = opt_lm(*given, "--mesh", "data=2", "--coordinator", "here:1")
    assert code == 2
    assert "--coordinator is for the flax backend" in err


@pytest.mark.parametrize("process", [None, "2/2", "1"])
def test_flax_processes_say_which_they_are(opt_lm, command, tmp_path, process):
    pytest.importorskip("flax")
    given = [*command, "--backend", "flax", "--out", tmp_path / "run", "--mesh", "data=2"]
    given += ["--coordinator", "127.0.0.1:1"] + (["--process", process] if process else [])
    code, _, err = opt_lm(*given)
    assert code == 2
    assert "--process: expected a number and a count, as 0/2" in err


@pytest.mark.slow  # the command is the one above, Flax's mesh that of tests/flax/test_sharding.py
def test_flax_trains_on_a_mesh_and_one_device_goes_on(opt_lm, command, alone, tmp_path):
    pytest.importorskip("flax")
    out = tmp_path / "run"
    given = [*command, "--backend", "flax", "--out", out]
    code, _, err = opt_lm(*given, "--max-steps", 4, "--mesh", "data=2,model=2")
    assert code == 0, err
    assert (out / "checkpoints" / "step-00000004" / "parts").is_dir()
    code, _, err = opt_lm(*given, "--max-steps", 6, "--resume")
    assert code == 0, err
    wanted = [row for row in alone("flax", opt_lm) if row[0] <= 4 or row[3] is None or row[0] == 6]
    same([row for row in figures(out) if not (row[0] == 4 and row[3])], wanted)


@pytest.mark.slow
def test_two_flax_processes_train_as_one(opt_lm, command, alone, tmp_path, monkeypatch):
    pytest.importorskip("flax")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    out = tmp_path / "run"
    given = [*command, "--backend", "flax", "--out", str(out), "--max-steps", "6"]
    given += ["--mesh", "data=2,model=2", "--coordinator", f"127.0.0.1:{free_port()}"]
    ranks = run_ranks("opt_cli", 2, [*given, "--process", "{rank}/2"], tmp_path)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    same(figures(out), alone("flax", opt_lm))


def test_plan(opt_lm):
    given = ("plan", "opt-13b", "--devices", 8)
    code, out, _ = opt_lm(*given, "--memory", "80GB")
    assert code == 0
    assert "--mesh data=2,fsdp=4,model=1" in out
    code, out, _ = opt_lm(*given, "--memory", "80GB", "--mesh", "data=8", "--json")
    found = json.loads(out)
    assert (code, found["fits"]) == (1, False)
    assert found["total"] > found["memory"]
    code, out, _ = opt_lm(*given, "--memory", "8GB")
    assert code == 1
    assert "no mesh of 8 devices of 8GB fits train with 8 rows of 2048 tokens in float32" in out
    for option, value, told in (
        ("--memory", "much", "--memory: expected a size such as 80GB or 16GiB"),
        ("--task", "play", "--task: expected train or generate"),
        ("--mesh", "data=2", "needs 2 devices, received 8"),
        ("--batch-size", 0, "--batch-size: expected an integer of at least 1"),
    ):
        memory = () if option == "--memory" else ("--memory", "80GB")
        code, _, err = opt_lm(*given, *memory, option, value)
        assert code == 2
        assert told in err
