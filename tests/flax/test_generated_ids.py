"""The result of `generate`, as users of `transformers`' Flax models and of JAX use it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from opt_core.errors import AbsentError, ArgumentError
from opt_flax import FlaxOPTForCausalLM, FlaxOPTModel
from tests.support.configs import CONFIGS
from tests.support.flax_models import SILENT, logits_of
from tests.support.reference import make_prompts

CONFIG = CONFIGS["pre_ln"].replace(**SILENT, num_hidden_layers=1)
IDS: Any = make_prompts(CONFIG, 2, 4)
FOUR = {"max_new_tokens": 4, "eos_token_id": None}


@pytest.fixture(scope="module")
def model() -> Any:
    return FlaxOPTForCausalLM(CONFIG)


@pytest.fixture(scope="module")
def ids(model):
    return model.generate(IDS, **FOUR)


def test_they_are_an_array(ids):
    plain = np.asarray(ids)
    assert plain.shape == ids.shape == (2, 8)
    assert len(ids) == 2
    assert [row.tolist() for row in ids] == ids.tolist() == plain.tolist()
    np.testing.assert_array_equal(ids[:, 4:], plain[:, 4:])
    for found, expected in (
        (ids + 1, plain + 1), (1 - ids, 1 - plain), (ids == ids, plain == plain), (-ids, -plain),
        (ids % 3, plain % 3), (2**ids.astype(float), 2.0**plain), (ids >= 5, plain >= 5),
        (jnp.concatenate([ids, ids], 1), np.concatenate([plain, plain], 1)),
        (jnp.where(ids > 5, ids, 0), np.where(plain > 5, plain, 0)),
        (jax.jit(lambda x: x[:, ::2])(ids), plain[:, ::2]),
        (ids.at[0, 0].set(3), np.concatenate([[3], plain.ravel()[1:]]).reshape(2, 8)),
    ):  # fmt: skip
        np.testing.assert_array_equal(found, expected)
    assert repr(ids) == repr(ids.sequences)


def test_they_have_themselves(model, ids):
    assert isinstance(ids.sequences, jax.Array)
    assert ids["sequences"] is ids.sequences is ids.to_tuple()[0]
    assert list(ids.keys()) == ["sequences"]
    jitted = jax.jit(lambda x: model.generate(x, **FOUR))
    np.testing.assert_array_equal(jitted(IDS).sequences, ids)
    inner = jax.jit(lambda x: model(x).logits)
    expected = inner(ids.sequences)
    np.testing.assert_allclose(inner(ids), expected, atol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda: model(ids).logits)(), expected, atol=1e-5)
    with pytest.raises(AbsentError, match="scores: generate kept none; pass return_dict_in"):
        _ = ids.scores
    assert not hasattr(ids, "scores")


def test_a_key_and_a_seed_mean_the_same_traced(model):
    def draw(**given):
        return model.generate(IDS, do_sample=True, **given, **FOUR)

    traced = jax.jit(draw)
    for name, key in (("prng_key", jax.random.key), ("seed", int)):
        found = set[bytes]()
        for seed in (0, 5):
            plain = np.asarray(draw(**{name: key(seed)}))
            given = jax.random.PRNGKey(seed) if name == "prng_key" else seed
            np.testing.assert_array_equal(traced(**{name: given}), plain)
            found.add(plain.tobytes())
        assert len(found) == 2


def test_a_loop_that_passes_what_is_none_so_far(model):
    def run(ids):
        past, found = None, []
        for place in range(3):
            out = model(ids[:, place : place + 1], past_key_values=past)
            past = out.past_key_values
            found.append(out.logits)
        return jnp.concatenate(found, 1)

    whole = logits_of(model, IDS[:, :3])
    for loop in (run, jax.jit(run)):
        np.testing.assert_allclose(loop(IDS), whole, atol=1e-5)
    model.train()
    caches = []
    jax.eval_shape(lambda: caches.append(model(IDS, past_key_values=None).past_key_values))
    assert caches == [None]
    model.eval()


def test_transformers_order_of_arguments(model):
    places = np.broadcast_to(np.arange(4), (2, 4))
    given = np.ones((2, 4), int), places, model.params, model.init_cache(2, 6)
    out = jax.jit(lambda *given: model(IDS, *given, True))(*given)
    np.testing.assert_allclose(out.logits, logits_of(model, IDS), atol=1e-5)
    assert out.attentions is not None
    assert out.hidden_states is None
    shape_first: Any = (1, 1), 0, jnp.float32
    with pytest.raises(ArgumentError, match=r"seed: expected an integer, received \(1, 1\)"):
        FlaxOPTForCausalLM(CONFIG, *shape_first)
    with pytest.raises(ArgumentError, match="FlaxOPTModel does not generate; load it as FlaxOPTFo"):
        FlaxOPTModel(CONFIG).generate(IDS)


def test_a_loop_with_inputs_that_the_model_prepares(model):
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 1]])
    inputs = model.prepare_inputs_for_generation(jnp.asarray(IDS), 6, mask)
    step = nnx.jit(lambda model, ids, inputs: model(ids, **inputs))
    out = step(model, IDS, inputs)
    token = jnp.argmax(out.logits[:, -1], -1)[:, None]
    inputs = model.update_inputs_for_generation(out, inputs)
    longer = np.concatenate([IDS, token], 1)
    expected = logits_of(model, longer, np.pad(mask, ((0, 0), (0, 1)), constant_values=1))
    found = step(model, token, inputs).logits[:, 0]
    np.testing.assert_allclose(found, expected[:, -1], atol=1e-5)
