"""The TPU compiler takes our programs, and they are what we think they are; no TPU is needed."""

import importlib.util
import math
import os

import pytest

pytest.importorskip("jax")
if importlib.util.find_spec("libtpu") is None:
    pytest.skip("libtpu, the TPU compiler, is not installed", allow_module_level=True)

import jax
import jax.numpy as jnp

from benchmarks import compiled_programs, tpu_compile
from opt_flax import attention
from tests.support.configs import CONFIGS

CONFIG = CONFIGS["pre_ln"].replace(
    vocab_size=999, hidden_size=256, num_hidden_layers=1, ffn_dim=512
)
TPU = tpu_compile.TPU()
WEIGHT = 256 * 256 * 2
"""Bytes of the smallest weight of a layer."""


@pytest.fixture(autouse=True, scope="module")
def flags_of_all_devices():
    """Ends the process where it finds a flag it does not know, as those of CPUs are."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "xla_cpu" not in flag]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XLA_FLAGS", " ".join(flags))
        yield


@pytest.fixture(autouse=True)
def precision_of_tpu_programs():
    """Other tests want the highest precision, which the kernels for bfloat16 cannot give."""
    with jax.default_matmul_precision("default"):
        yield


@pytest.fixture
def small(monkeypatch):
    """Programs for 4 rows of 256 slots."""
    monkeypatch.setattr(compiled_programs, "ROWS", 4)
    monkeypatch.setattr(compiled_programs, "LENGTH", 256)


def rows_of(lower, chip, sizes):
    mesh, found = TPU.make_mesh(chip, sizes), {}
    for name, compiled in lower(CONFIG, mesh, TPU.implementation):
        row = TPU.row("tiny", chip, mesh.size, "", name, 4, memory=TPU.memory(chip))
        compiled_programs.describe(TPU, compiled, row, CONFIG)
        found[name] = row
    return found


def test_generation_compiles_for_four_chips(small):
    found = rows_of(compiled_programs.lower_generation, "v5e", (1, 2, 2))
    assert list(found) == ["prefill", "decode step", "decode loop"]
    for row in found.values():
        assert 0 < row.arguments + row.temporaries < row.memory
        assert row.collectives
    weights = found["prefill"].arguments
    # Keys and values of a layer, 4 rows of 256 slots, on four chips; ids and masks are small.
    cache = 2 * 4 * 256 * 256 * 2 // 4
    assert cache <= found["decode step"].arguments - weights < 1.1 * cache
    step = found["decode step"]
    assert step.seconds is not None
    assert 0 < step.seconds < 0.1
    # A step moves its few states; prefill moves the weights that "fsdp" splits.
    assert step.largest_gather < WEIGHT / 4 < found["prefill"].largest_gather


@pytest.mark.slow  # the compiler is asked the same way for generation
def test_training_compiles_for_two_chips(small):
    (row,) = rows_of(compiled_programs.lower_training, "v6e", (1, 4, 1)).values()
    assert 0 < row.arguments + row.temporaries < row.memory
    assert row.seconds is None
    assert row.collectives["all-gather"]


@pytest.mark.slow  # what it computes is tested by its interpreter (test_flash_attention.py)
@pytest.mark.parametrize("size", [64, 80, 128])
def test_the_tpu_kernel_needs_a_tenth_of_the_memory(size):
    mesh = TPU.make_mesh("v5e", (1, 1, 1))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    shape = (1, 16, 2048, size)
    states = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)] * 3
    mask = jax.ShapeDtypeStruct((1, 2048), jnp.bool_, sharding=whole)

    def temporaries(function, *arguments):
        return compiled_programs.temporaries(jax.jit(function).lower(*arguments).compile())

    def kernel(q, k, v, mask=None):
        return attention.flash(q, k, v, None, mask, 0.0, mesh)

    plain = temporaries(lambda q, k, v: attention.sdpa(q, k, v, None), *states)
    assert temporaries(kernel, *states) < plain / 10
    assert temporaries(kernel, *states, mask) < plain / 10

    def gradient(of):
        return jax.grad(lambda q, k, v: of(q, k, v).astype(jnp.float32).sum(), (0, 1, 2))

    plain = temporaries(gradient(lambda q, k, v: attention.sdpa(q, k, v, None)), *states)
    assert temporaries(gradient(kernel), *states) < plain / 4


@pytest.mark.slow  # a benchmark's row about an error that is the compiler's
def test_the_compiler_refuses_what_does_not_fit(monkeypatch):
    monkeypatch.setitem(tpu_compile.PLANS, "opt-30b", {"v5e": "1x1x1 1x1x1"})
    (row,) = compiled_programs.measure(TPU, "opt-30b", "v5e", ("prefill",))
    assert row.error is not None
    assert "memory" in row.error
    assert row.seconds is None


@pytest.mark.parametrize(
    ("stated", "least", "seconds"), [(0.5, 0.1, 0.5), (-2.9, 0.0, 0.1), (0.25, 1.1, 1.25)]
)
def test_the_compilers_estimate_is_completed(stated, least, seconds):
    assert tpu_compile.estimate(stated, least) == pytest.approx(seconds)


def test_every_official_size_has_a_plan():
    for plans in tpu_compile.PLANS.values():
        assert plans.keys() == tpu_compile.CHIPS.keys()
        for chip, plan in plans.items():
            for meshes in compiled_programs.parse_plan(plan):
                assert all(math.prod(sizes) in tpu_compile.CHIPS[chip].slices for sizes in meshes)
