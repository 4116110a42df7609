"""Dropout, and activations that are computed again."""

import itertools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
from flax import nnx

from tests.support.configs import CONFIGS
from tests.support.flax_models import SILENT, close, close_gradients, model_of
from tests.support.reference import make_prompts
from tests.support.tiers import tiered

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)


def test_dropout_is_on_in_training_mode_only(folder):
    model, ids = model_of(folder, CONFIG), make_prompts(CONFIG, 1, 9)
    still = model(ids).logits
    close(model(ids).logits, still, 0)
    model.train()
    first, second = model(ids).logits, model(ids).logits
    assert np.abs(first - second).max() > 0.1
    close(model(ids, deterministic=True).logits, still, 0)
    a, b = (model(ids, rngs=nnx.Rngs(dropout=5)).logits for _ in range(2))
    close(a, b, 0)
    model.eval()
    close(model(ids).logits, still, 0)
    c = model(ids, deterministic=False, rngs=nnx.Rngs(5)).logits
    assert np.abs(c - still).max() > 0.1


@pytest.mark.parametrize(
    ("where", "attention_implementation"),
    tiered(  # only attention weights are dropped where attention is computed
        itertools.product(SILENT, ["sdpa", "eager"]),
        lambda where, attention: attention == "sdpa" or where == "attention_dropout",
    ),
)
def test_each_dropout_field_acts(folder, where, attention_implementation):
    config = CONFIG.replace(**{**SILENT, where: 0.5})
    model = model_of(folder, config, attn_implementation=attention_implementation)
    model.train()
    ids = make_prompts(config, 1, 9)
    run = nnx.jit(lambda m: m(ids).logits)
    outputs = np.stack([run(model) for _ in range(12)])
    assert outputs.std(0).max() > 0.01
    quiet = model_of(folder, config.replace(**SILENT))
    quiet.train()
    assert np.abs(outputs.mean(0) - quiet(ids).logits).max() < 6 * outputs.std(0).max()


@pytest.mark.parametrize(
    ("variant", "scan"),
    tiered(
        itertools.product(CONFIGS, [False, True]),
        lambda variant, scan: variant == "pre_ln" and scan,
    ),
)
def test_gradient_checkpointing_changes_no_gradient(folder, variant, scan):
    ids = make_prompts(CONFIGS[variant], 2, 9)
    found = []
    for recompute in (False, True):
        model = model_of(folder, variant, scan_layers=scan)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        graph, state = nnx.split(model)

        def loss(state, graph=graph):
            model = nnx.merge(graph, state)
            return model(ids, labels=ids, rngs=nnx.Rngs(dropout=3)).loss

        params, rest = nnx.split_state(state, nnx.Param, ...)
        grad = jax.jit(jax.grad(lambda p, r, loss=loss: loss(nnx.merge_state(p, r))))
        traced = grad.trace(params, rest)
        assert ("remat" in str(traced.jaxpr)) == recompute
        found.append(traced.lower().compile()(params, rest))
        model.gradient_checkpointing_disable()
        assert not model.get_decoder().gradient_checkpointing
    for a, b in zip(*(jax.tree.leaves(x) for x in found), strict=True):
        close_gradients(a, b)


def test_generation_never_drops(folder):
    model, ids = model_of(folder, CONFIG), make_prompts(CONFIG, 1, 5)
    expected = model.generate(ids, max_new_tokens=12)
    model.train()
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=12), expected)
    assert not model.get_decoder().deterministic
