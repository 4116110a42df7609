"""Texts that models, outputs and caches print in a notebook: one screen each."""

import numpy as np
import pytest

from opt_core import GenerationConfig
from opt_core.summaries import describe_value
from tests.support.backends import Backend

SCREEN = 50


@pytest.fixture
def model(backend: Backend, folder):
    return backend.load(folder("pre_ln"))


def test_layers_that_are_alike_are_one_branch(model):
    lines = repr(model).splitlines()
    assert len(lines) < SCREEN
    count = model.config.num_hidden_layers
    assert f"(0-{count - 1}): {count} x" in repr(model)
    assert sum("q_proj" in line for line in lines) == 1
    assert all(part in repr(model) for part in ("embed_tokens", "fc1", "final_layer_norm"))
    assert str(model) == repr(model)


def test_outputs_and_caches_show_shapes_not_numbers(model):
    ids = np.array([[2, 5, 6]], np.int32)
    out = model(ids, output_hidden_states=True)
    layers = model.config.num_hidden_layers
    lines = repr(out).splitlines()
    assert len(lines) <= 10
    assert lines[0].endswith("OPTOutput(")
    assert f"  logits: float32 [1, 3, {model.config.vocab_size}]," in lines
    states = f"float32 [1, 3, {model.config.hidden_size}]"
    assert f"  hidden_states: {layers + 1} x ({states})," in lines
    assert f"    keys: {layers} x (float32 [1, " in repr(out)
    cache = repr(model.init_cache(2, 16))
    assert cache.startswith("KVCache(\n  keys:")
    assert "  length: 0," in cache.splitlines()


def test_a_generation_config_shows_what_was_set():
    assert repr(GenerationConfig(do_sample=True, top_k=5)) == (
        'GenerationConfig {\n  "do_sample": true,\n  "top_k": 5\n}'
    )


def test_a_scalar_inside_a_program_is_no_number(backend):
    """Each framework has its own error for a value that is not there; none stops a print."""
    seen = []
    if backend.name == "torch":
        import torch
        from torch._subclasses.fake_tensor import FakeTensorMode

        seen.append(describe_value(torch.zeros((), device="meta")))
        with FakeTensorMode():
            seen.append(describe_value(torch.zeros(()) + 1))
    elif backend.name == "tf":
        import tensorflow as tf

        tf.function(lambda x: seen.append(describe_value(x)))(tf.constant(1.0))
        seen.append(describe_value(tf.keras.Input((), dtype="float32", batch_size=1)[0]))
    else:
        import jax

        jax.jit(lambda x: seen.append(describe_value(x)))(1.0)
        jax.eval_shape(lambda x: seen.append(describe_value(x)), np.float32(1))
    assert seen == ["float32 scalar"] * 2
    assert describe_value(np.float32(1.5)) == "float32 1.5"
