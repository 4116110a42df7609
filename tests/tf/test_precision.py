"""Types of weights, and Keras' policies of mixed precision."""

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import keras
import tensorflow as tf

from opt_core.errors import CheckpointError, ConfigError
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tf_models import QUIET, history_of, model_of
from tests.support.tiers import tiered


@pytest.mark.parametrize(
    "policy",
    tiered(["mixed_bfloat16", "mixed_float16"], lambda policy: policy == "mixed_bfloat16"),
)
def test_mixed_precision_policies(folder, policy):
    ids = make_prompts(QUIET, 8, 12)
    model = model_of(folder, QUIET, dtype=policy)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert model(ids).logits.dtype == policy.removeprefix("mixed_")
    full = model_of(folder, QUIET)(ids, labels=ids)
    half = model(ids, labels=ids)
    assert half.loss.dtype == "float32"
    np.testing.assert_allclose(half.loss, full.loss, rtol=0.02)
    model.compile(optimizer=keras.optimizers.Adam(3e-3), run_eagerly=True)
    history = history_of(model, ids, batch_size=8)
    assert history["loss"][-1] < history["loss"][0] - 0.1
    out = model.generate(ids, max_new_tokens=4, eos_token_id=None)
    assert out.shape == (8, 16)


def test_the_global_policy_is_kerases(folder):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = opt_tf.TFOPTForCausalLM(QUIET)
        assert (model.compute_dtype, model.variable_dtype) == ("bfloat16", "float32")
        assert model.model.decoder.blocks[0].fc1.compute_dtype == "bfloat16"
        assert model_of(folder).compute_dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_half_precision_is_near_and_finite(folder, variant, dtype):
    ids, mask = make_prompts(CONFIGS[variant], 3, 9), make_mask("left", [9, 5, 2])
    half = model_of(folder, variant, dtype=dtype)
    assert {v.dtype for v in half.trainable_variables} == {dtype}
    logits = tf.cast(half(ids, attention_mask=mask).logits, tf.float32).numpy()
    full = model_of(folder, variant)(ids, attention_mask=mask).logits.numpy()
    assert np.isfinite(logits).all()
    assert np.abs(logits - full)[mask > 0].max() < (0.8 if dtype == "bfloat16" else 0.1)


def test_dtype_auto_is_the_stored_one(folder, tmp_path):
    model_of(folder, dtype=tf.bfloat16).save_pretrained(tmp_path)
    loaded = opt_tf.TFOPTForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == "bfloat16"
    assert model_of(folder, dtype="float64")([[2, 5]]).logits.dtype == tf.float64
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        opt_tf.TFOPTForCausalLM.from_pretrained(tmp_path, dtype="fp16")


def test_values_beyond_float16_are_refused(folder, tmp_path):
    model = model_of(folder)
    weight = model.get_decoder().blocks[0].fc2.weight
    weight.assign(weight * 1e8)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc2\.weight: values beyond the range"):
        opt_tf.TFOPTForCausalLM.from_pretrained(tmp_path, dtype="float16")
