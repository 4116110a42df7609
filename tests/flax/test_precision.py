"""Types of weights."""

import itertools

import numpy as np
import pytest

pytest.importorskip("jax")

import jax.numpy as jnp

from opt_core.errors import CheckpointError, ConfigError
from tests.support.configs import CONFIGS
from tests.support.flax_models import MODEL, logits_of, model_of
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered


@pytest.mark.parametrize(
    ("variant", "dtype"),
    tiered(
        itertools.product(CONFIGS, ["bfloat16", "float16"]),
        lambda variant, dtype: variant == "pre_ln" or dtype == "bfloat16",
    ),
)
def test_half_precision_is_near_and_finite(folder, variant, dtype):
    ids, mask = make_prompts(CONFIGS[variant], 3, 9), make_mask("left", [9, 5, 2])
    half = model_of(folder, variant, dtype=dtype)
    assert half.dtype == jnp.dtype(dtype)
    logits = logits_of(half, ids, mask).astype(jnp.float32)
    full = logits_of(model_of(folder, variant), ids, mask)
    assert jnp.isfinite(logits).all()
    seen = np.array(mask, bool)
    assert np.abs(logits - full)[seen].max() < (0.8 if dtype == "bfloat16" else 0.1)


def test_types_that_cannot_be_had(folder, tmp_path):
    with pytest.raises(ConfigError, match="JAX has float64 switched off"):
        model_of(folder, dtype="float64")
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        model_of(folder, dtype="fp16")
    model = model_of(folder)
    weight = model.get_decoder().layers[0].fc2.weight
    weight.set_value(weight[...] * 1e8)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc2\.weight: values beyond the range"):
        MODEL.from_pretrained(tmp_path, dtype="float16")


def test_dtype_auto_is_the_stored_one(folder, tmp_path):
    model_of(folder, dtype="bfloat16").save_pretrained(tmp_path)
    loaded = MODEL.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == jnp.bfloat16
    assert loaded.config.dtype == "bfloat16"
    assert MODEL.from_pretrained(tmp_path, dtype=jnp.float16).dtype == "float16"
