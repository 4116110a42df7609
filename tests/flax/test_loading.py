"""Heads that a checkpoint lacks or has too many."""

import math
import warnings

import numpy as np
import pytest

pytest.importorskip("jax")


import jax
import jax.numpy as jnp
from flax import nnx

from opt_core.errors import ConfigError
from tests.support.flax_models import MODEL


def test_a_head_can_be_left_behind(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = folder("post_ln", "sequence_classification")
        model = MODEL.from_pretrained(path)
    ids = np.array([[2, 5, 6]])
    assert math.isfinite(nnx.jit(lambda m: m(ids, labels=ids).loss)(model))


def test_types_and_places_as_transformers_names_them(folder):
    for dtype in (jnp.bfloat16, jnp.dtype("bfloat16"), "bfloat16"):
        assert MODEL.from_pretrained(folder("pre_ln"), dtype=dtype).dtype == jnp.bfloat16
    with pytest.raises(ConfigError, match=r"device_map: .* received 'cuda:0'; use mesh="):
        MODEL.from_pretrained(folder("pre_ln"), device_map={"": 0})


def test_programs_follow_what_is_set_on_a_configuration(folder):
    """A configuration is part of a program: setting it makes another, taking it back does not."""
    model, traced = MODEL.from_pretrained(folder("pre_ln")), []
    config = model.config

    @nnx.jit
    def kept(model, x):
        traced.append(None)
        return x * model.config.pad_token_id

    for pad in (1, 5, 1, 5):
        config.pad_token_id = pad
        assert kept(model, 1.0) == pad
        assert jax.jit(lambda model, x: x * model.config.pad_token_id)(model, 1.0) == pad
        assert model.config is model.model.config is model.get_decoder().config is config
    assert len(traced) == 2
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    other.config.pad_token_id = 7
    assert config.pad_token_id == 5
    assert other.config is other.model.config
