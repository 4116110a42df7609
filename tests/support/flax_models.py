"""Models of Flax for its own tests, and when their numbers are close."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import opt_flax
from opt_core.config import OPTConfig
from tests.support import backend_flax  # noqa: F401  it has programs compiled sooner
from tests.support.backends import GRADIENT_TOLERANCE, ORACLE_TOLERANCE

SILENT = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
MODEL: Any = opt_flax.FlaxOPTForCausalLM


def model_of(folder, variant: str | OPTConfig = "pre_ln", **options) -> Any:
    return MODEL.from_pretrained(folder(variant), **options)


def close(ours, theirs, atol=ORACLE_TOLERANCE):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol)


def close_gradients(ours, theirs):
    # The gradient of k_proj.bias is zero: what is there is rounding noise of 1e-7.
    close(ours, theirs, max(GRADIENT_TOLERANCE * float(jnp.abs(theirs).max()), 3e-7))


@nnx.jit
def logits_of(model, ids, mask=None, cache=None):
    """One program for each shape: operation by operation, each would be a program of its own."""
    return model(ids, attention_mask=mask, past_key_values=cache).logits


def gradients(model, ids, mask=None):
    return nnx.grad(lambda m: m(ids, labels=ids, attention_mask=mask).loss)(model)
