"""Attention without a kernel of its own."""

import numpy as np
import pytest

pytest.importorskip("jax")

from flax import nnx

from tests.support.backends import GRADIENT_TOLERANCE, ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.flax_models import model_of
from tests.support.reference import make_mask, make_prompts

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "bare"])
def test_long_texts_in_pieces_are_the_whole(folder, padded):
    """The pairs that "sdpa" leaves out on a CPU are those its mask hides."""
    ids, mask = make_prompts(CONFIG, 2, 301), make_mask("left", [301, 140])
    mask = mask if padded else np.ones_like(mask)
    labels, found = np.where(mask, ids, -100), []
    if padded:
        labels[1, -140] = -100  # nothing but padding foretells it
    for kind in ("sdpa", "eager"):
        model = model_of(folder, CONFIG, attn_implementation=kind)
        model.eval()
        given = {"attention_mask": mask} if padded else {}

        @nnx.jit
        def learn(model, given=given):
            def loss(model):
                out = model(ids, labels=labels, **given)
                return out.loss, out.logits

            return nnx.grad(loss, has_aux=True)(model)

        gradient, logits = learn(model)
        query = gradient["model"]["decoder"]["layers"][0]["self_attn"]["q_proj"]["weight"][...]
        found.append((np.asarray(logits)[mask > 0], np.asarray(query)))
    (logits, slope), (theirs, other) = found
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=ORACLE_TOLERANCE)
    np.testing.assert_allclose(slope, other, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(other).max())
