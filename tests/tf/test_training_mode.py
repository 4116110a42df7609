"""Dropout, and activations that are computed again."""

import itertools

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import tensorflow as tf

from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.tf_models import model_of
from tests.support.tiers import tiered


def test_dropout_is_on_in_training_only(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 9)
    still = model(ids).logits
    np.testing.assert_array_equal(model(ids, training=False).logits, still)
    seeds = model.get_decoder().dropout_seeds.state
    seeds.assign([3, 0])
    first, second = (model(ids, training=True).logits.numpy() for _ in range(2))
    assert np.abs(first - second).max() > 0.1
    seeds.assign([3, 0])
    np.testing.assert_array_equal(model(ids, training=True).logits, first)


@pytest.mark.parametrize(
    ("where", "attention"),
    tiered(  # only attention weights are dropped where attention is computed
        itertools.product(["dropout", "attention_dropout", "layerdrop"], ["sdpa", "eager"]),
        lambda where, attention: attention == "sdpa" or where == "attention_dropout",
    ),
)
def test_each_dropout_field_acts(folder, where, attention):
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    config = CONFIGS["pre_ln"].replace(num_hidden_layers=1, **{**silent, where: 0.5})
    model = model_of(folder, config, attn_implementation=attention)
    ids = make_prompts(config, 1, 9)
    model.get_decoder().dropout_seeds.state.assign([1, 0])
    outputs = np.stack([model(ids, training=True).logits for _ in range(12)])
    assert outputs.std(0).max() > 0.01
    quiet = model_of(folder, config.replace(**silent))(ids, training=True).logits
    assert np.abs(outputs.mean(0) - quiet).max() < 6 * outputs.std(0).max()


def gradients_of(model, ids, compiled):
    def run(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        return tape.gradient(loss, model.trainable_variables)

    model.get_decoder().dropout_seeds.state.assign([7, 0])
    run = tf.function(run, jit_compile=compiled) if compiled is not None else run
    return [tf.convert_to_tensor(g).numpy() for g in run(tf.constant(ids))]


@pytest.mark.parametrize(
    "compiled",
    [pytest.param(None, marks=pytest.mark.slow), False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["eager", "graph", "xla"],
)
def test_gradient_checkpointing_changes_no_gradient(folder, compiled):
    ids = make_prompts(CONFIGS["galactica"], 2, 9)
    model = model_of(folder, "galactica")
    expected = gradients_of(model, ids, compiled)
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients_of(model, ids, compiled), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert not model.get_decoder().gradient_checkpointing


def test_gradient_checkpointing_really_recomputes(folder, monkeypatch):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 4)
    fc1, calls = model.get_decoder().blocks[0].fc1, []
    inner = fc1.call
    monkeypatch.setattr(fc1, "call", lambda *a, **k: (calls.append(1), inner(*a, **k))[1])
    gradients_of(model, ids, None)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    gradients_of(model, ids, None)
    assert len(calls) == 3
