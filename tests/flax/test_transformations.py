"""JAX' and NNX' transformations of models and caches."""

import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import nnx

from opt_flax import FlaxOPTForCausalLM
from tests.support.configs import CONFIGS
from tests.support.flax_models import SILENT, close, close_gradients, gradients, logits_of, model_of
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered


def test_models_are_made_while_something_is_traced():
    config = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
    shapes = nnx.eval_shape(lambda: FlaxOPTForCausalLM(config))
    table = shapes.get_decoder().embed_tokens.embedding.get_value()
    assert isinstance(table, jax.ShapeDtypeStruct)
    expected = FlaxOPTForCausalLM(config)
    made = nnx.jit(lambda: FlaxOPTForCausalLM(config))()
    ids = make_prompts(config, 1, 4)
    close(made(ids).logits, expected(ids).logits)


@pytest.mark.parametrize("variant", tiered(CONFIGS, lambda variant: variant == "pre_ln"))
def test_transformations_change_nothing(folder, variant):
    config = CONFIGS[variant].replace(num_hidden_layers=1)
    model, ids, mask = (
        model_of(folder, config),
        make_prompts(config, 3, 9),
        make_mask("left", [9, 5, 2]),
    )
    expected = model(ids, attention_mask=mask).logits
    close(nnx.jit(lambda m, i, k: m(i, attention_mask=k).logits)(model, ids, mask), expected)
    graph, state = nnx.split(model)
    pure = jax.jit(lambda state, i, k: nnx.merge(graph, state)(i, attention_mask=k).logits)
    close(pure(state, ids, mask), expected)
    one = jax.vmap(lambda i, k: nnx.merge(graph, state)(i[None], attention_mask=k[None]).logits[0])
    close(jax.jit(one)(jnp.asarray(ids), jnp.asarray(mask)), expected)


@pytest.mark.slow  # those of tests/flax/test_user_programs.py are inside of it too
def test_gradients_can_be_taken_inside_jit(folder):
    config = CONFIGS["pre_ln"].replace(**SILENT, num_hidden_layers=1)
    model, ids = model_of(folder, config), make_prompts(config, 2, 9)
    plain = gradients(model, ids)
    jitted = nnx.jit(gradients)(model, jnp.asarray(ids))
    for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(plain), strict=True):
        close_gradients(a, b)


def test_outputs_and_caches_cross_jit(folder):
    config = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
    model, ids = model_of(folder, config), make_prompts(config, 3, 9)
    step = nnx.jit(lambda m, i, cache: m(i, past_key_values=cache))
    first = step(model, ids[:, :4], model.init_cache(3, 9))
    second = step(model, ids[:, 4:], first.past_key_values)
    close(second.logits, logits_of(model, ids)[:, 4:])
    assert int(second.past_key_values.length) == 9
    # The same cache again, outside: arrays are values.
    again = model(ids[:, 4:], past_key_values=first.past_key_values)
    close(again.logits, second.logits)
