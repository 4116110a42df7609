"""Heads that a checkpoint lacks or has too many."""

import math
import warnings
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")


import opt_flax
from tests.support.configs import CONFIGS
from tests.support.flax_models import MODEL


def test_a_fresh_head_warns(folder):
    config = CONFIGS["pre_ln"].replace(num_labels=5)
    kind: Any = opt_flax.FlaxOPTForSequenceClassification
    with pytest.warns(
        UserWarning, match=r"no score\.weight in this checkpoint; it is freshly initialised"
    ):
        model = kind.from_pretrained(folder("pre_ln"), config=config)
    assert model.score.weight.shape == (5, 32)
    assert 0 < model.score.weight[...].std() < 0.1


def test_a_head_can_be_left_behind(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = folder("post_ln", "sequence_classification")
        model = MODEL.from_pretrained(path)
    assert math.isfinite(model(np.array([[2, 5, 6]]), labels=np.array([[2, 5, 6]])).loss)
