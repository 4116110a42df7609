"""`--mesh`: one command in several processes, to the same numbers; lost ones; `opt-lm plan`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")

from opt_core.data import write_blocks
from opt_core.training.run_folder import RunFolder, read_metrics
from tests.support.files.tiny_folder import save_model
from tests.support.processes.command_ranks import run as run_here
from tests.support.processes.hosts import two_hosts
from tests.support.processes.ranks import ROOT, free_port, run_ranks

CLOSE = 1e-5
"""Losses of a run on a mesh and of one process, or of another mesh."""

MINUTE = 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


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
    values = [np.array([*x], float) for x in (ours, theirs)]
    np.testing.assert_allclose(*values, rtol=0, atol=CLOSE)


@pytest.fixture(scope="module")
def hosts():
    with two_hosts() as found:
        yield found


def check_reads(each, model, steps=4):
    """Each host reads half of the weights and its own rows alone."""
    size = (model / "model.safetensors").stat().st_size
    for reads in each:
        assert reads["weights"] < 0.55 * size
        # Two rows in each step, and those that are compared: the first one, the middle, the last.
        assert reads["rows"][0] <= 2 * steps + 3


def test_two_hosts_train_as_one_and_one_goes_on(opt_lm, answers, tiny, alone):
    (first, second), out, arguments = answers["train"]
    assert [first.code, second.code] == [0, 0], (first, second)
    assert "4 steps" in first.told
    assert not second.told.strip()
    check_reads([first.reads, second.reads], tiny)
    parts = sorted((out / "checkpoints" / "step-00000004" / "parts").iterdir())
    assert len(parts) == 2
    code, _, err = opt_lm(*arguments, "--max-steps", 6, "--resume")
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


LONG = ["--max-steps", "4000", "--mesh", "fsdp=2"]
"""Of a training in the middle of which a process is killed."""


def kill(victim, out, processes):
    """Kills a process when a run is under way; when that was."""
    while len(figures(out)) < 4 and all(process.poll() is None for process in processes):
        time.sleep(0.1)
    processes[victim].send_signal(signal.SIGKILL)
    return time.monotonic()


def check_loss(opt_lm, command, out, told, victim):
    """The other process says whom it lost; one goes on, to what an unbroken run comes to."""
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert f"process {1 - victim} of 2: lost connection, gone: process {victim};" in line
    assert "--resume" in line
    steps = RunFolder(out).steps()[-1] + 2
    for folder, *resume in ((out, "--resume"), (out.with_name("unbroken"),)):
        arguments = ["--backend", "torch", "--out", folder, "--max-steps", steps, *resume]
        assert opt_lm(*command, *arguments)[0] == 0
    same(*(dict.fromkeys(map(tuple, figures(run))) for run in (out, out.with_name("unbroken"))))


def test_a_lost_process_ends_the_run_and_it_goes_on(opt_lm, answers, command):
    (found, *others), out, _ = answers["lost"]
    assert not others, "the second one was killed"
    assert found.code == 2
    check_loss(opt_lm, command, out, found.told, 1)


@pytest.mark.slow  # the one that keeps what the others say
def test_the_first_process_is_lost(opt_lm, command, tmp_path):
    out, since = tmp_path / "run", []
    ranks = run_ranks(
        "opt_cli", 2, [*command, "--backend", "torch", "--out", str(out), *LONG], tmp_path, 300,
        lambda processes: since.append(kill(0, out, processes)),
    )  # fmt: skip
    assert time.monotonic() - since[0] < MINUTE
    assert [rank.code for rank in ranks] == [-signal.SIGKILL, 2]
    check_loss(opt_lm, command, out, ranks[1].told, 0)


class Answer(NamedTuple):
    """How a command ended in a process: its exit code, its words, what had been read until then."""

    code: int
    told: str
    reads: Any


@pytest.fixture(scope="module")
def answers(command, tiny, text, tmp_path_factory, hosts):
    """Answers of two hosts to some commands, the folder of each run, and its arguments.

    They are started once, and do all of them one after another: a training, what cannot be, what
    measures a model, and a training in the middle of which the second process is killed.
    """
    home = tmp_path_factory.mktemp("answers")
    out = {name: home / f"run {name}" for name in (*REFUSED, "train", "lost")}
    plain = [*command, "--backend", "torch"]
    common = [*plain, "--max-steps", "4", "--mesh"]
    for rank in range(2):
        ids = np.random.default_rng(rank).integers(3, 60, 400)
        write_blocks(home / f"host{rank}" / "data", [ids], 16, 60)
    data = [tiny, "data", *command[3:], "--backend", "torch", "--mesh", "fsdp=2"]
    other = shutil.copytree(tiny, home / "model")
    begun = ["train", str(other), *command[2:], "--backend", "torch"]
    ((code, said),) = run_here([[*begun, "--max-steps", "2", "--out", str(out["model"])]], 0)
    assert code == 0, said
    shutil.rmtree(other)
    save_model(other, num_hidden_layers=1, num_attention_heads=8)
    refused = {
        "size": [*common, "data=4"],
        "meshes": [*common, ["data=2", "fsdp=2"]],
        "rows": [*common, "data=2", "--batch-size", "3"],
        "settings": [*common, "data=2", "--learning-rate", ["1e-3", "1e-4"]],
        "data": ["train", *map(str, data), "--max-steps", "4"],
        "model": [*begun, "--max-steps", "4", "--mesh", "fsdp=2", "--resume"],
    }
    assert refused.keys() == REFUSED.keys()
    commands = {
        "train": [*common, "fsdp=2"], **refused,
        **{name: [*a, "--mesh", "model=2"] for name, a in measures(tiny, text).items()},
        "lost": [*plain, *LONG],
    }  # fmt: skip
    given = [
        [*arguments, *(("--out", str(out[name])) if name in out else ())]
        for name, arguments in commands.items()
    ]
    since = []
    ranks = run_ranks(
        "tests.support.processes.command_ranks", 2, [str(home), "{rank}", json.dumps(given)], home,
        disturb=lambda processes: since.append(kill(1, out["lost"], processes)), hosts=hosts,
    )  # fmt: skip
    assert time.monotonic() - since[0] < MINUTE
    assert [rank.code for rank in ranks] == [0, -signal.SIGKILL], ranks
    lines = [(home / f"told{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    assert [len(each) for each in lines] == [len(commands), len(commands) - 1]
    return {
        name: ([Answer(*json.loads(each[i])) for each in lines if i < len(each)], out.get(name),
               [*plain, "--out", out.get(name)])
        for i, name in enumerate(commands)
    }  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("How much of it is known, and how much is not? " * 20)
    return path


def measures(model, text):
    """The commands that measure a model, by name."""
    model, text = str(model), str(text)
    return {
        "perplexity": ["eval", "perplexity", text, "--model", model, "--window", "16", "--json"],
        "verify": ["verify", model, model, "-n", "4"],
        "bench": ["bench", model, "--task", "batch", "--reps", "1", "-n", "4", "--json"],
    }


def test_measures_on_a_mesh_are_those_of_one_process(opt_lm, answers, tiny, text):
    """The first process says them, the others nothing."""
    found = {name: answers[name][0] for name in measures(tiny, text)}
    for name, (first, second) in found.items():
        assert (first.code, second.code, second.told) == (0, 0, ""), (name, first, second)
    alone = json.loads(opt_lm(*measures(tiny, text)["perplexity"]).out)
    ours = json.loads(found["perplexity"][0].told)
    assert ours["tokens"] == alone["tokens"]
    assert abs(ours["nats_per_token"] - alone["nats_per_token"]) < CLOSE
    assert "equal: largest difference 0.00e+00" in found["verify"][0].told
    assert json.loads(found["bench"][0].told)["tok_s"] > 0


@pytest.mark.slow
def test_flax_measures_on_a_mesh(opt_lm, tiny, text):
    pytest.importorskip("flax")
    alone, spread = (
        json.loads(opt_lm(*measures(tiny, text)["perplexity"], "--backend", "flax", *mesh).out)
        for mesh in ((), ("--mesh", "data=2,model=2"))
    )
    assert abs(spread["nats_per_token"] - alone["nats_per_token"]) < CLOSE
    for name, option in (("verify", "--backends"), ("bench", "--backend")):
        given = (*measures(tiny, text)[name], option, "flax", "--mesh", "fsdp=2,model=2")
        assert opt_lm(*given).code == 0


def test_measures_of_several_backends_take_no_mesh(opt_lm, tiny):
    code, _, err = opt_lm("verify", tiny, tiny, "--backends", "torch,tf", "--mesh", "model=2")
    assert code == 2
    assert "--mesh: expected one backend, torch or flax, received torch,tf" in err


REFUSED = {
    "size": "error: mesh: data=4 x fsdp=1 x model=1 needs 4 devices, received 2\n",
    "meshes": "error: mesh: process 0 has 'data=2 x fsdp=1 x model=1', process 1 has 'data=1 x",
    "rows": "error: --batch-size: 3 rows cannot be shared by data x fsdp = 2 devices in 1 equal",
    "settings": "error: settings: process 0 has learning_rate=0.001, process 1 has learning_rate=0",
    "data": "error: data: process 0 has '25 examples, ",
    "model": "the checkpoint of step 2 is of another model: num_attention_heads: expected 8, found",
}
"""Commands that cannot be, and how the answer of every process begins."""


@pytest.mark.parametrize("name", REFUSED)
def test_every_process_refuses_alike(answers, name):
    found, out, _ = answers[name]
    for code, told, _ in found:
        assert code == 2, told
        assert told == found[0].told
        assert told.count("\n") == told.count("error:") == 1
        assert REFUSED[name] in told
    if name == "model":  # as it was before
        assert RunFolder(out).steps() == [2]
        assert not [path for path in out.rglob("*") if "tmp" in path.name]
    else:
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


def test_tensorflow_has_one_host(opt_lm, command, tmp_path, monkeypatch):
    pytest.importorskip("tensorflow")
    workers = {"cluster": {"worker": ["here:1", "there:1"]}, "task": {"type": "worker", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(workers))
    given = [*command, "--backend", "tf", "--out", tmp_path / "run", "--mesh", "data=1"]
    code, _, err = opt_lm(*given)
    assert code == 2
    assert "TF_CONFIG: names several hosts, and mesh is for the devices of one; Keras' fit" in err
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
def test_torchrun_on_two_hosts(opt_lm, command, alone, tmp_path, hosts):
    """Two processes on each of them, as the documentation says."""
    out = tmp_path / "run"
    port = free_port()
    given = [*("--nnodes", "2", "--nproc-per-node", "2", "--max-restarts", "1"),
             *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{hosts[0].address}:{port}"),
             *("--local-addr", "ADDRESS", "-m", "opt_cli", *command, "--backend", "torch"),
             *("--out", str(out), "--max-steps", "6", "--mesh", "data=2,fsdp=2")]  # fmt: skip
    logs = [tmp_path / f"torchrun{number}" for number in range(2)]
    agents = []
    for host, log in zip(hosts, logs, strict=True):
        arguments = [host.address if value == "ADDRESS" else value for value in given]
        start = [*host.prefix, sys.executable, "-m", "torch.distributed.run", *arguments]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment["GLOO_SOCKET_IFNAME"] = host.interface
        with log.open("w") as file:
            agents.append(
                subprocess.Popen(start, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    codes = [agent.wait(400) for agent in agents]
    assert codes == [0, 0], [log.read_text()[-3000:] for log in logs]
    same(figures(out), alone("torch", opt_lm))


@pytest.mark.slow
def test_two_flax_hosts_train_as_one(opt_lm, command, tiny, alone, tmp_path, monkeypatch, hosts):
    pytest.importorskip("flax")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    out = tmp_path / "run"
    given = [str(tmp_path / "reads{rank}"), *command, "--backend", "flax", "--out", str(out)]
    given += ["--mesh", "fsdp=2,model=2", "--coordinator", f"{hosts[0].address}:{free_port()}"]
    given += ["--max-steps", "6", "--process", "{rank}/2"]
    ranks = run_ranks("tests.support.processes.counted_command", 2, given, tmp_path, hosts=hosts)
    assert [rank.code for rank in ranks] == [0, 0], ranks
    same(figures(out), alone("flax", opt_lm))
    reads = [json.loads((tmp_path / f"reads{rank}").read_text()) for rank in range(2)]
    check_reads(reads, tiny, steps=6)


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
