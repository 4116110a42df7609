"""A model spread over processes computes what one process computes, each holding its own part."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from opt_core.errors import ConfigError  # noqa: E402
from opt_torch import sharding  # noqa: E402
from tests.support import torch_ranks  # noqa: E402
from tests.support.backends import GRADIENT_TOLERANCE, ORACLE_TOLERANCE  # noqa: E402
from tests.support.torch_ranks import KINDS, compute, save_models, tier_of  # noqa: E402

STEPS_TOLERANCE = 1e-5
"""Of weights and losses after three steps of AdamW."""

PAIRS = [[1, 1, 2], [1, 2, 1], [2, 1, 1]]
LARGER = [[[1, 2, 2], [2, 1, 2], [2, 2, 1], [1, 1, 4]], [[2, 2, 2], [1, 1, 8]]]
"""Meshes of two processes; of four, and of eight, where heads do not divide."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders of models, one for each configuration."""
    path = tmp_path_factory.mktemp("models")
    for name, config in KINDS.items():
        save_models(config, path / name)
    return path


@pytest.fixture(scope="module")
def expected(home):
    """The results of one process, by configuration."""
    found: dict[Any, torch_ranks.Found] = {}

    def get(name: str, tier: torch_ranks.Tier) -> torch_ranks.Found:
        if (name, tier) not in found:
            found[name, tier] = compute(KINDS[name], home / name, None, tier)
        return found[name, tier]

    return get


def test_two_processes_are_one(home, expected, tmp_path):
    check_meshes(home, expected, tmp_path, PAIRS, quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [PAIRS, *LARGER], ids=["2", "4", "8"])
def test_all_that_a_model_does_is_as_in_one_process(home, expected, tmp_path, meshes):
    check_meshes(home, expected, tmp_path, meshes, quick=False)


def check_meshes(home, expected, out, meshes, quick):
    names = [*KINDS]
    given = {"home": str(home), "out": str(out), "meshes": meshes, "names": names, "quick": quick}
    count = int(np.prod(meshes[0]))
    run_ranks("tests.support.torch_ranks", count, [json.dumps(given)], out)
    for sizes in meshes:
        label = "-".join(map(str, sizes))
        for name in names:
            tier = tier_of(sizes, name == names[0], quick)
            if tier is None:
                continue
            theirs = expected(name, tier)
            for rank in range(count):
                ours = dict(np.load(out / f"{label}-{name}-{rank}.npz"))
                assert ours.keys() == theirs.keys()
                for key, value in ours.items():
                    compare(f"{label}, {name}, rank {rank}: {key}", key, value, theirs[key])


def compare(what, key, ours, theirs):
    kind, _, _ = key.partition("/")
    if kind == "ids":
        np.testing.assert_array_equal(ours, theirs, err_msg=what)
        return
    largest = float(np.abs(theirs).max())
    limit = {
        "logits": ORACLE_TOLERANCE,
        "gradients": GRADIENT_TOLERANCE * largest,
        "losses": STEPS_TOLERANCE,
        "weights": STEPS_TOLERANCE,
    }[kind]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit, err_msg=what)


def run_ranks(module: str, count: int, arguments: list[str], out: Path, limit: int = 500) -> None:
    """Starts a program once for each rank, as torchrun does, and waits until all have succeeded."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(torch_ranks.__file__).parents[2]
    common = {
        **os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    logs, processes = [out / f"log{rank}" for rank in range(count)], []
    try:
        for rank, log in enumerate(logs):
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("w") as file:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", module, *arguments],
                        cwd=root, env=environment, stdout=file, stderr=subprocess.STDOUT,
                    )
                )  # fmt: skip
        for process in processes:
            process.wait(limit)
    except subprocess.TimeoutExpired:
        pass  # said below, with what the processes said
    finally:
        for process in processes:
            process.kill()
    codes = [process.wait() for process in processes]
    tails = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
    assert codes == [0] * count, f"exit codes {codes} within {limit} s:\n{tails}"


def test_meshes_that_cannot_be_used(monkeypatch):
    make: Any = sharding.make_mesh
    monkeypatch.setenv("WORLD_SIZE", "8")
    for sizes, needed in (((3, 1, 4), 12), ((1, 2, 2), 4)):
        asked = "data={} x fsdp={} x model={}".format(*sizes)
        with pytest.raises(ConfigError, match=rf"{asked} needs {needed} devices, received 8"):
            make(*sizes)
    for size in (0, 2.0, True):
        with pytest.raises(ConfigError, match=r"mesh: expected integers of at least 1, received"):
            make(fsdp=size)
    with pytest.raises(ConfigError, match=r"expected a torch.distributed DeviceMesh, received int"):
        sharding.check_mesh(8)  # pyright: ignore[reportArgumentType]
