"""A model spread over processes computes what one process computes, each holding its own part."""

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from opt_core.errors import ConfigError  # noqa: E402
from opt_core.training.config import TrainConfig  # noqa: E402
from opt_torch import OPTForCausalLM, sharding  # noqa: E402
from opt_torch.training import make_optimizer  # noqa: E402
from tests.support.backends import GRADIENT_TOLERANCE, ORACLE_TOLERANCE  # noqa: E402
from tests.support.processes import torch_ranks  # noqa: E402
from tests.support.processes.ranks import run_ranks  # noqa: E402
from tests.support.processes.torch_ranks import KINDS, compute, parts_of, save_models  # noqa: E402

STEPS_TOLERANCE = 1e-5
"""Of weights and losses after three steps of AdamW."""

LIMIT = 1800
"""Seconds: eight processes that share two cores take their time."""

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

    def get(name: str, parts: torch_ranks.Parts) -> torch_ranks.Found:
        if (name, parts) not in found:
            found[name, parts] = compute(KINDS[name], home / name, None, parts)
        return found[name, parts]

    return get


def test_two_processes_are_one(home, expected, tmp_path):
    """Heads shared, and weights shared, which shares rows too: as "data" alone does more simply."""
    check_meshes(home, expected, tmp_path, PAIRS[:2], quick=True)


@pytest.mark.slow
@pytest.mark.parametrize("meshes", [PAIRS, *LARGER], ids=["2", "4", "8"])
def test_all_that_a_model_does_is_as_in_one_process(home, expected, tmp_path, meshes):
    check_meshes(home, expected, tmp_path, meshes, quick=False)


def check_meshes(home, expected, out, meshes, quick):
    names = [*KINDS]
    given = {"home": str(home), "out": str(out), "meshes": meshes, "names": names, "quick": quick}
    count = int(np.prod(meshes[0]))
    ranks = run_ranks(
        "tests.support.processes.torch_ranks", count, [json.dumps(given)], out, limit=LIMIT
    )
    tails = "\n".join(
        f"--- rank {number}\n{rank.told[-3000:]}" for number, rank in enumerate(ranks)
    )
    assert [rank.code for rank in ranks] == [0] * count, tails
    for sizes in meshes:
        label = "-".join(map(str, sizes))
        for name in names:
            parts = parts_of(sizes, name == names[0], quick)
            if parts is None:
                continue
            theirs = expected(name, parts)
            for rank in range(count):
                ours = dict(np.load(out / f"{label}-{name}-{rank}.npz"))
                assert ours.keys() == theirs.keys()
                for key, value in ours.items():
                    compare(f"{label}, {name}, rank {rank}: {key}", key, value, theirs[key])
        check_saved(out / f"saved-{label}", home / names[0] / "OPTForCausalLM", out)


def check_saved(folder, source, out):
    """A folder that several processes wrote is that of one, file by file."""
    alone = out / "alone"
    OPTForCausalLM.from_pretrained(source).save_pretrained(alone, max_shard_size="100KB")
    names = sorted(path.name for path in alone.iterdir())
    assert names == sorted(path.name for path in folder.iterdir())
    assert len(names) > 4
    for name in names:
        assert (folder / name).read_bytes() == (alone / name).read_bytes(), name


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


def test_a_mesh_of_one_process_needs_no_torchrun(home):
    mesh = sharding.make_mesh()
    try:
        model = OPTForCausalLM(KINDS["post_ln"], seed=3, mesh=mesh)
        plain = OPTForCausalLM(KINDS["post_ln"], seed=3)
        for name, value in plain.state_dict().items():
            assert torch.equal(model.state_dict()[name], value), name
        ours, theirs = (
            one.generate([[2, 5, 6]], seed=1, do_sample=True, max_new_tokens=3)
            for one in (model, plain)
        )
        assert torch.equal(ours, theirs)
        with pytest.raises(ConfigError, match="quantize: expected None with mesh, received 'int8'"):
            OPTForCausalLM.from_pretrained(
                home / "pre_ln" / "OPTForCausalLM", mesh=mesh, quantize="int8"
            )
        config = KINDS["pre_ln"].replace(layerdrop=0.1)
        with pytest.raises(ConfigError, match=r"layerdrop: expected 0 on a mesh, received 0\.1"):
            make_optimizer(OPTForCausalLM(config, mesh=mesh), TrainConfig())
        with pytest.raises(ConfigError, match="expected the axes data, fsdp, model"):
            OPTForCausalLM(KINDS["pre_ln"], mesh=mesh["fsdp", "model"])
    finally:
        sharding.disconnect()


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


@pytest.mark.slow
def test_training_on_one_device_imports_nothing_of_a_mesh():
    names = ("torch.distributed.tensor", "torch.distributed.checkpoint", "torch.distributed.fsdp")
    program = f"import opt_torch.trainer, sys; print(*(n for n in {names} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
