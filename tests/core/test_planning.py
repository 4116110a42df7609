"""The arithmetic of memory, against the parameter list and a compiler's own figures."""

import json
from pathlib import Path

import pytest

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.params import count_parameters
from opt_core.planning import Work, plan, suggest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
COMPILED = {
    f"{row['size']} on {row['devices']} {row['device']}, {row['program']}": row
    for name in ("tpu", "gpu")
    for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]
    if row["program"] in ("training step", "decode step")
}
"""Programs that were compiled, with the bytes that the compiler says they take."""
CLOSE = 0.15
"""Share by which what comes and goes may be off the compiler's peak of a model of many billions."""
MANY = 6 * 10**9
"""Parameters from which on plans matter; of fewer, a plan must only not promise too much."""

TRAIN = Work("train", "float32", 8, 2048)
ALONE = {"data": 1, "fsdp": 1, "model": 1}


def test_one_device_holds_everything():
    config = OPTConfig.from_preset("opt-125m")
    found = plan(config, TRAIN, ALONE)
    assert found.weights == found.gradients == 4 * count_parameters(config)
    assert found.moments == 2 * found.weights
    assert found.cache == found.gathered == 0
    running = plan(config, Work("generate", "bfloat16", 3, 100), ALONE)
    assert running.cache == 2 * 12 * 3 * 100 * 768 * 2
    assert running.moments == running.gradients == 0
    assert running.weights == 2 * count_parameters(config)


@pytest.mark.parametrize("name", COMPILED)
def test_the_compiler_finds_the_same(name):
    row = COMPILED[name]
    data, fsdp, model = map(int, row["mesh"].split(" x "))
    task = "train" if row["program"] == "training step" else "generate"
    config, work = OPTConfig.from_preset(row["size"]), Work(task, "bfloat16", row["batch"], 2048)
    found = plan(config, work, {"data": data, "fsdp": fsdp, "model": model})
    # These are Flax' programs, which split a cache's rows; PyTorch holds all on every process.
    elsewhere = found.cache * (1 - 1 / (data * fsdp))
    assert found.resident - elsewhere == pytest.approx(row["arguments"], rel=2e-3)
    if count_parameters(config) > MANY:
        assert found.total - elsewhere == pytest.approx(row["peak"], rel=CLOSE)
    else:
        assert found.total > (1 - CLOSE) * row["peak"]


def test_what_is_split_is_held_in_parts():
    config = OPTConfig.from_preset("opt-1.3b")
    whole, split = (plan(config, TRAIN, ALONE | sizes) for sizes in ({}, {"fsdp": 4, "model": 2}))
    assert whole.weights / 8 < split.weights < whole.weights / 7.9
    assert split.gathered > 0
    cache = plan(config, Work("generate", "float16", 8, 64), ALONE | {"model": 4}).cache
    assert cache == plan(config, Work("generate", "float16", 8, 64), ALONE).cache // 4


def test_the_least_talkative_mesh_that_fits():
    config = OPTConfig.from_preset("opt-13b")
    roomy, narrow = (suggest(config, TRAIN, 8, size * 10**9) for size in (400, 80))
    assert roomy is not None
    assert roomy.mesh == {"data": 8, "fsdp": 1, "model": 1}
    assert narrow is not None
    assert narrow.mesh == {"data": 2, "fsdp": 4, "model": 1}
    assert suggest(config, TRAIN, 8, 20 * 10**9) is None
    big = OPTConfig.from_preset("opt-175b")
    found = suggest(big, Work("generate", "bfloat16", 8, 2048), 8, 141 * 10**9)
    assert found is not None
    assert found.mesh == {"data": 2, "fsdp": 1, "model": 4}
    # A mesh must divide the rows.
    uneven = suggest(config, Work("train", "float32", 3, 64), 8, 400 * 10**9)
    assert uneven is None or uneven.mesh["data"] * uneven.mesh["fsdp"] == 1
    with pytest.raises(
        ConfigError, match=r"devices: expected an integer of at least 1, received 0"
    ):
        suggest(config, TRAIN, 0, 1)
