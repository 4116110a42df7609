"""Key-value caches, which are values."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import tensorflow as tf

from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.tf_models import model_of


def test_a_cache_may_be_continued_twice(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 6)
    first = model(ids[:, :4], past_key_values=model.init_cache(1, 10)).past_key_values
    once, again = (model(ids[:, 4:], past_key_values=first).logits for _ in range(2))
    np.testing.assert_array_equal(once, again)


def test_caches_go_through_functions_of_tensorflow(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 6)
    run = tf.function(lambda ids, cache: model(ids, past_key_values=cache))
    first: Any = run(tf.constant(ids[:, :4]), model.init_cache(2, 8))
    assert isinstance(first, opt_tf.TFOPTOutput)
    cache: Any = first.past_key_values
    assert cache.length == 4
    second = run(tf.constant(ids[:, 4:]), cache)
    np.testing.assert_allclose(second.logits, model(ids).logits[:, 4:], rtol=0, atol=2e-5)
