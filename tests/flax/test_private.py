"""Undocumented names of JAX: they are there, and nothing else needs them.

That a model does not load them is shown in tests/cli/test_startup.py.
"""

import sys

import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from opt_core.errors import ConfigError  # noqa: E402
from opt_flax import _private, attention  # noqa: E402

SPLASH = "jax.experimental.pallas.ops.tpu.splash_attention"


def test_the_splash_kernel_is_in_the_installed_version():
    kernel, masks = _private.load_splash_attention()
    names = ("SegmentIds", "BlockSizes", "make_splash_mha_single_device")
    assert all(hasattr(kernel, name) for name in names)
    assert hasattr(masks, "MultiHeadMask")
    assert hasattr(masks, "CausalMask")


def test_without_the_kernel_the_others_work(monkeypatch):
    monkeypatch.setitem(sys.modules, SPLASH, None)
    states = jnp.ones((1, 2, 4, 8))
    with pytest.raises(ConfigError, match=r"^attn_implementation=.* of JAX 0.10, which JAX \S+ "):
        attention._pallas(states, states, states, None)
    assert attention.sdpa(states, states, states, None).shape == (1, 2, 4, 8)
    assert attention.eager(states, states, states, None, 0.0, None)[0].shape == (1, 2, 4, 8)
