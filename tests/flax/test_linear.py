"""Linear layers."""

import math

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp

from opt_flax import linear
from tests.support.flax_models import close


def test_few_rows_are_multiplied_the_other_way_round_on_a_cpu():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(56, 32)), jnp.float32)
    most = linear.FEW_ROWS
    for shape in ((32,), (1, 32), (2, 32), (3, 2, 32), (11, 32), (most, 32), (most + 1, 32)):
        rows = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) / 100
        few = np.prod(shape[:-1]) <= most
        close(linear.linear(rows, weight), np.asarray(rows) @ np.asarray(weight).T, 2e-4)
        for platform in ("cpu", "tpu", "cuda"):
            traced = jax.jit(linear.linear).trace(rows, weight)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert ("optimization_barrier" in text) == (few and platform == "cpu")
            is_single = math.prod(shape[:-1]) == 1
            assert ("8x7x32" in text) == (is_single and platform == "cpu")
            assert ("16x32" in text) == (shape == (11, 32) and platform == "cpu")
