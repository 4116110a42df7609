"""Flash attention of the Flax backend: the TPU kernel interpreted, the GPU kernel's stand-in."""

import itertools
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import opt_flax  # noqa: E402
from opt_core.errors import ConfigError  # noqa: E402
from opt_flax import attention, sharding  # noqa: E402
from tests.support.backends import GRADIENT_TOLERANCE, ORACLE_TOLERANCE  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.flax_models import logits_of  # noqa: E402
from tests.support.reference import make_mask, make_prompts  # noqa: E402
from tests.support.tiers import tiered  # noqa: E402

QUIET = CONFIGS["pre_ln"].replace(dropout=0.0, num_hidden_layers=1)


@pytest.fixture
def tpu(monkeypatch):
    """Everything believes it is on a TPU, whose kernel is interpreted."""
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "tpu")
    monkeypatch.setattr(attention, "_pallas", partial(attention._pallas, interpret=True))


def states(heads, length, size, seed=0):
    rng = np.random.default_rng(seed)
    shape = (2, heads, length, size)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(4)]


def close(ours, theirs, tolerance=ORACLE_TOLERANCE):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("size", "length", "side"),
    tiered(
        [
            (64, 300, None),
            (64, 300, "left"),
            (80, 130, "right"),
            (128, 128, "left"),
            (8, 5, "left"),
        ],
        lambda size, length, side: size == 80,
    ),
)
def test_the_tpu_kernel_computes_what_eager_does(size, length, side):
    *inputs, weights = states(2, length, size)
    mask = None if side is None else jnp.asarray(make_mask(side, [length, length // 2 + 1]), bool)
    real = jnp.ones((2, length)) if mask is None else mask
    weights = weights * real[:, None, :, None]
    bias = attention.make_bias(mask, length, 0, length, jnp.dtype(jnp.float32))

    def plain(q, k, v):
        return attention.eager(q, k, v, bias, 0.0, None)[0]

    def kernel(q, k, v):
        return attention._pallas(q, k, v, mask, interpret=True)

    mixed = jax.jit(kernel)(*inputs)
    assert jnp.isfinite(mixed).all()
    close(mixed * real[:, None, :, None], plain(*inputs) * real[:, None, :, None])
    found, expected = (
        jax.jit(jax.grad(lambda q, k, v, f=f: (f(q, k, v) * weights).sum(), (0, 1, 2)))(*inputs)
        for f in (kernel, plain)
    )
    for a, b in zip(found, expected, strict=True):
        close(a, b, GRADIENT_TOLERANCE * float(jnp.abs(b).max()))


CASES = [  # four heads: eight ways do not divide them
    (None, None), (None, "left"), ((1, 1, 1), "right"), ((2, 2, 2), None), ((2, 2, 2), "left"),
    ((1, 1, 8), "right"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "side"), tiered(CASES, lambda sizes, side: side == "left" or sizes == (1, 1, 8))
)
def test_a_model_with_the_tpu_kernel_is_the_same_model(folder, tpu, monkeypatch, sizes, side):
    devices = 1 if sizes is None else int(np.prod(sizes))
    mesh = None if sizes is None else sharding.make_mesh(*sizes, devices=jax.devices()[:devices])
    path, calls = folder(QUIET), []
    kernel = attention._pallas
    monkeypatch.setattr(attention, "_pallas", lambda *a: calls.append(a[0].shape) or kernel(*a))
    load = opt_flax.FlaxOPTForCausalLM.from_pretrained
    plain, flash = load(path), load(path, attn_implementation="flash_attention_2", mesh=mesh)
    ids = make_prompts(QUIET, 4, 9)
    mask = None if side is None else make_mask(side, [9, 5, 2, 7])
    real = np.ones((4, 9), bool) if mask is None else np.asarray(mask, bool)

    found = np.asarray(nnx.jit(lambda m, ids: m(ids, attention_mask=mask).logits)(flash, ids))
    assert np.isfinite(found).all()
    close(found[real], np.asarray(logits_of(plain, ids, mask))[real])
    shape = {None: (4, 4), (1, 1, 1): (4, 4), (2, 2, 2): (1, 2), (1, 1, 8): (4, 4)}[sizes]
    assert {call[:2] for call in calls} == {shape}


def test_generation_and_gradients_with_the_tpu_kernel(folder, tpu):
    load = partial(opt_flax.FlaxOPTForCausalLM.from_pretrained, folder(QUIET))
    plain, flash = load(), load(attn_implementation="flash_attention_2")
    ids, mask = make_prompts(QUIET, 2, 9), make_mask("left", [9, 5])
    settings = {"max_new_tokens": 12, "eos_token_id": None}
    a, b = (m.generate(ids, mask, **settings) for m in (plain, flash))
    np.testing.assert_array_equal(a, b)
    found, expected = (
        nnx.jit(nnx.grad(lambda m: m(ids, labels=ids).loss))(m) for m in (flash, plain)
    )
    for a, b in zip(*(jax.tree.leaves(g) for g in (found, expected)), strict=True):
        # The gradient of k_proj.bias is zero but for rounding.
        close(a, b, GRADIENT_TOLERANCE * float(jnp.abs(b).max()) + 1e-7)


def test_what_continues_a_cache_takes_the_plain_path(folder, tpu):
    load = partial(opt_flax.FlaxOPTForCausalLM.from_pretrained, folder(QUIET))
    plain, flash = load(), load(attn_implementation="flash_attention_2")
    ids = make_prompts(QUIET, 2, 9)
    step = nnx.jit(lambda m, ids, cache: m(ids, past_key_values=cache))
    first = step(flash, ids[:, :4], flash.init_cache(2, 9))
    second = step(flash, ids[:, 4:], first.past_key_values)
    close(second.logits, logits_of(plain, ids)[:, 4:])


@pytest.mark.parametrize(
    ("side", "sizes"),
    tiered(
        itertools.product([None, "left", "right"], [None, (2, 2, 2)]),
        lambda side, sizes: (side == "left") == (sizes is not None) and side != "right",
    ),
)
def test_the_gpu_kernel_gets_what_it_can_take(folder, monkeypatch, sizes, side):
    """A stand-in has cuDNN's limits and computes what XLA does."""
    real_kernel, calls = jax.nn.dot_product_attention, []

    def stand_in(query, key, value, bias, is_causal, implementation):
        if implementation == "cudnn":
            assert query.dtype == jnp.bfloat16
            assert bias is None or all(n % 2 == 0 for n in bias.shape[2:])
            calls.append(bias is None)
        return real_kernel(query, key, value, bias=bias, is_causal=is_causal, implementation="xla")

    path, mesh = folder(QUIET), None if sizes is None else sharding.make_mesh(*sizes)
    load = partial(opt_flax.FlaxOPTForCausalLM.from_pretrained, path, dtype="bfloat16")
    ids = make_prompts(QUIET, 4, 9)
    mask = None if side is None else make_mask(side, [9, 5, 2, 7])
    real = np.ones((4, 9), bool) if mask is None else np.asarray(mask, bool)
    expected = logits_of(load(), ids, mask)
    monkeypatch.setattr(attention, "platform_of", lambda mesh: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    flash = load(attn_implementation="flash_attention_2", mesh=mesh)
    found = nnx.jit(lambda m, i: m(i, attention_mask=mask).logits)(flash, ids)
    assert set(calls) == {mask is None}
    close(np.asarray(found, np.float32)[real], np.asarray(expected, np.float32)[real], 0.3)


@pytest.mark.parametrize(
    ("platform", "dtype", "dropout", "message"),
    [
        ("cpu", jnp.bfloat16, 0.0, r"flash_attention_2.*needs a GPU or a TPU, received cpu"),
        ("gpu", jnp.float32, 0.0, "needs float16 or bfloat16 on a GPU, received float32"),
        ("gpu", jnp.float16, 0.1, r"expected attention_dropout=0 in training, received 0\.1"),
        ("tpu", jnp.float32, 0.1, r"expected attention_dropout=0 in training, received 0\.1"),
    ],
)
def test_flash_attention_says_where_it_cannot_run(platform, dtype, dropout, message):
    with pytest.raises(ConfigError, match=message):
        attention.check_flash(platform, jnp.dtype(dtype), dropout)


def test_flash_attention_is_refused_when_a_model_is_loaded(folder):
    with pytest.raises(ConfigError, match="received cpu"):
        opt_flax.FlaxOPTForCausalLM.from_pretrained(
            folder("pre_ln"), attn_implementation="flash_attention_2"
        )


def test_attention_dropout_is_refused_in_training_only(folder, tpu):
    model = opt_flax.FlaxOPTForCausalLM.from_pretrained(
        folder("galactica"), attn_implementation="flash_attention_2"
    )
    ids = make_prompts(CONFIGS["galactica"], 2, 5)
    assert np.isfinite(np.asarray(logits_of(model, ids))).all()
    model.train()
    with pytest.raises(ConfigError, match="attention_dropout"):
        model(ids)
