"""`generate` inside the user's own compiled program."""

import jax
import numpy as np
import pytest
from flax import nnx

from opt_core.errors import GenerationError
from opt_flax import FlaxOPTForCausalLM
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
MASK = make_mask("left", [7, 4])
IDS = np.where(MASK, make_prompts(CONFIG, 2, 7), 1)
SETTINGS = {"max_new_tokens": 6, "eos_token_id": list(range(40, 50)), "pad_token_id": 1}


@pytest.fixture(scope="module")
def model(folder):
    return FlaxOPTForCausalLM.from_pretrained(folder(CONFIG))


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"num_beams": 2},
        # What a key or a seed draws is that of `generate` alone: tests/flax/test_generated_ids.py.
        pytest.param({"do_sample": True, "top_k": 5}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_jit_of_generate(model, extra):
    settings = {**SETTINGS, **extra}
    key = jax.random.key(3)
    jitted = jax.jit(lambda ids, mask, key: model.generate(ids, mask, prng_key=key, **settings))
    found = np.asarray(jitted(IDS, MASK, key))
    if "do_sample" in extra:
        np.testing.assert_array_equal(found, np.asarray(jitted(IDS, MASK, key)))
        assert (found != np.asarray(jitted(IDS, MASK, jax.random.key(4)))).any()
        return
    plain = np.asarray(model.generate(IDS, MASK, **settings))
    np.testing.assert_array_equal(found[:, : plain.shape[1]], plain)
    assert (found[:, plain.shape[1] :] == 1).all()
    assert found.shape == (2, 13)


def test_jit_of_the_method_itself(model):
    model.generation_config.update(max_new_tokens=6, eos_token_id=None)
    plain = np.asarray(model.generate(IDS, MASK))
    np.testing.assert_array_equal(np.asarray(jax.jit(model.generate)(IDS, MASK)), plain)
    jitted = nnx.jit(lambda model, ids, mask: model.generate(ids, mask))
    np.testing.assert_array_equal(np.asarray(jitted(model, IDS, MASK)), plain)
    with pytest.raises(GenerationError, match=r"inside jax\.jit or tf.function nothing can run"):
        jax.jit(lambda ids: model.generate(ids, logits_processor=[lambda i, s: s]))(IDS)
