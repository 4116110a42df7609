"""Heads that a checkpoint lacks or has too many."""

import math
import warnings

import numpy as np
import pytest

pytest.importorskip("jax")


from tests.support.flax_models import MODEL


def test_a_head_can_be_left_behind(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = folder("post_ln", "sequence_classification")
        model = MODEL.from_pretrained(path)
    assert math.isfinite(model(np.array([[2, 5, 6]]), labels=np.array([[2, 5, 6]])).loss)
