"""Attention without a kernel of its own."""

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import tensorflow as tf

from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tf_models import model_of


def test_long_texts_in_pieces_are_the_whole(folder):
    """The pairs that "sdpa" leaves out are those its mask hides, for padded rows too."""
    ids, mask = make_prompts(CONFIGS["pre_ln"], 2, 301), make_mask("left", [301, 140])
    labels, found = np.where(mask, ids, -100), []
    labels[1, -140] = -100  # nothing but padding foretells it
    for kind in ("sdpa", "eager"):
        model = model_of(folder, attn_implementation=kind)
        with tf.GradientTape() as tape:
            out = model(ids, attention_mask=mask, labels=labels)
        query = model.get_decoder().blocks[0].self_attn.q_proj.weight
        found.append((out.logits.numpy()[mask > 0], tape.gradient(out.loss, query.value).numpy()))
    (logits, gradient), (theirs, other) = found
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=2e-5)
    np.testing.assert_allclose(gradient, other, rtol=0, atol=1e-5 * np.abs(other).max())
