"""Programs for GPUs: which attention they take, and what docs/devices.md says of them."""

import importlib.util
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from flax import nnx  # noqa: E402

from benchmarks import compiled_programs, compiled_tables, gpu_compile, tpu_compile  # noqa: E402
from opt_core import OPTConfig, TrainConfig  # noqa: E402
from opt_flax import FlaxOPTForCausalLM, attention, training  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"
GPU, TPU = gpu_compile.GPU(), tpu_compile.TPU()
MOVED, SMALL = 1.05, {"opt-125m", "opt-350m", "opt-1.3b"}
"""Most bytes moved in a decode step, to weights and cache; sizes that move a little more, as do
weights spread by "fsdp" (1.051, of opt-175b on 16 H100)."""
SMALL_MOVED = 1.07
TEMPORARIES = 0.05
"""Of a prompt's attention, to those of the plain one."""


@pytest.mark.parametrize("target", [GPU, TPU], ids=["gpu", "tpu"])
def test_tables_of_the_page_are_the_results(target):
    rows, sizes = compiled_programs.load(target)
    lines = [compiled_tables.cells(target, row) for row in rows]
    lines += compiled_tables.attention_cells(sizes)
    name = f"{target.results.stem}_compile"
    table = PAGE.read_text().partition(f"<!-- {name} -->")[2].partition(f"<!-- /{name} -->")[0]
    found = [line for line in table.splitlines() if line.startswith("| opt-")]
    assert lines
    assert found == [compiled_tables.markdown_row(line) for line in lines]


def test_results_hold_what_is_promised():
    rows, sizes = compiled_programs.load(GPU)
    steps = [row for row in rows if row.program == "decode step"]
    assert steps
    for row in steps:
        is_spread = row.mesh.split(" x ")[1] != "1"  # partial sums come from other devices too
        limit = SMALL_MOVED if row.size in SMALL or is_spread else MOVED
        assert row.moved <= limit * row.arguments, row.key
        assert row.copies == 0, row.key
    promised = set(compiled_programs._ordered(GPU))
    assert {row.key for row in rows} == promised  # nothing is left out
    for row in rows:
        assert row.error is None, row.key
        if row.program == "prefill":
            layers = OPTConfig.from_preset(row.size).num_hidden_layers
            assert row.kernels["cuDNN attention"] == layers, row.key
    assert len(sizes) == len(compiled_programs.ATTENTION_SIZES)
    assert all(kernel <= TEMPORARIES * plain for kernel, plain in sizes.values())


def test_a_training_step_puts_no_weights_through_a_condition():
    """XLA's GPU compiler holds what one returns beside what it is given, whole on every device.

    So opt-6.7b's step took 61 GiB on each of four; it takes 16.
    """
    model = FlaxOPTForCausalLM(CONFIGS["pre_ln"].replace(num_hidden_layers=1), seed=None)
    optimizer = nnx.eval_shape(lambda: training.make_optimizer(model, TrainConfig()))
    graph, state = nnx.split((model, optimizer))
    ids = jax.ShapeDtypeStruct((2, 8), jnp.int32)
    inputs, how = {"input_ids": ids, "labels": ids}, (0.0, False)
    step: Any = training._step
    lowered = step.lower(graph, state, inputs, np.uint32(0), np.float32(0), how).as_text()
    results = re.findall(r'%\d+:(\d+) = "stablehlo.(?:case|if)"', lowered)  # one for each platform
    assert 0 < max(map(int, results)) < len(jax.tree.leaves(state)) / 3


def test_every_official_size_has_a_plan_of_whole_hosts():
    assert gpu_compile.PLANS.keys() == tpu_compile.PLANS.keys()
    for plans in gpu_compile.PLANS.values():
        assert plans.keys() == gpu_compile.CARDS.keys()
        for plan in plans.values():
            for meshes in compiled_programs.parse_plan(plan):
                counts = [math.prod(sizes) for sizes in meshes]
                assert all(n < 8 or n % gpu_compile.PER_HOST == 0 for n in counts)


def test_a_buffer_lies_on_a_mesh_as_the_cache_does():
    config = OPTConfig.from_preset("opt-175b")
    assert gpu_compile.buffer_shape(config, "1 x 2 x 8") == (4, 12, 2048, 128)
    assert gpu_compile.buffer_shape(config, "1 x 1 x 5") == (8, 96, 2048, 128)


@pytest.fixture
def ampere(monkeypatch):
    """A GPU that cuDNN has kernels for; says what they are asked."""
    asked = []

    def kernel(q, k, v, bias):
        asked.append((q.shape, None if bias is None else bias.shape))
        return attention._jax_sdpa(q, k, v, bias)

    card = SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "gpu")
    monkeypatch.setattr(attention.jax, "devices", lambda: [card])
    monkeypatch.setattr(attention, "_cudnn", kernel)
    return SimpleNamespace(asked=asked, card=card)


def states(T: int, S: int, size: int = 64, dtype: Any = jnp.bfloat16) -> tuple[Any, Any, Any]:
    query, key = (jnp.zeros((1, 2, count, size), dtype) for count in (T, S))
    return query, key, key


def test_a_prompt_goes_to_cudnn(ampere):
    bias = jnp.zeros((1, 1, 8, 8), jnp.bfloat16)
    assert attention.sdpa(*states(8, 8), None).shape == (1, 2, 8, 64)
    attention.sdpa(*states(8, 8), bias)
    assert ampere.asked == [((1, 2, 8, 64), None), ((1, 2, 8, 64), (1, 1, 8, 8))]


@pytest.mark.parametrize(
    ("inputs", "capability"),
    [
        (states(1, 1), "8.0"),
        (states(4, 8), "8.0"),
        (states(8, 8, dtype=jnp.float32), "8.0"),
        (states(8, 8, size=12), "8.0"),
        (states(8, 8, size=136), "8.0"),
        (states(8, 8), "7.5"),
        (states(8, 8), "gfx942"),
    ],
    ids=["step", "continued", "float32", "odd heads", "large heads", "Turing", "AMD"],
)
def test_what_cudnn_does_not_take_goes_elsewhere(ampere, inputs: Any, capability: str):
    ampere.card.compute_capability = capability
    bias = None if inputs[0].shape == inputs[1].shape else jnp.zeros((1, 1, 4, 8), inputs[0].dtype)
    attention.sdpa(*inputs, bias_B1TS=bias)
    assert not ampere.asked


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason="XLA's GPU compiler is installed apart (benchmarks/gpu_compile.py)",
)
def test_a_decode_loop_copies_no_cache(monkeypatch):
    config = CONFIGS["pre_ln"].replace(hidden_size=256, num_hidden_layers=2, ffn_dim=512)
    mesh = GPU.make_mesh("H100", (1, 1, 1))
    monkeypatch.setattr(compiled_programs, "LENGTH", 256)
    programs = dict(compiled_programs.lower_generation(config, mesh, GPU.implementation))
    shape = (compiled_programs.ROWS, config.num_attention_heads, 256, config.head_dim)
    for name in ("decode step", "decode loop"):
        program = gpu_compile.Program(programs[name].as_text())
        assert gpu_compile.count_copies(program, shape, 2) == 0
