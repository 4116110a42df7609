"""The loss that never holds all logits, against cross entropy written out in float64."""

import importlib

import numpy as np
import pytest

from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts


def cross_entropy(hidden, head, labels, smoothing):
    """Mean cross entropy of each next token, and its gradients."""
    logits, targets = hidden[:, :-1] @ head.T, labels[:, 1:]
    kept, V = targets != -100, len(head)
    wanted = (1 - smoothing) * np.eye(V)[np.where(kept, targets, 0)] + smoothing / V
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    loss = -((wanted * np.log(shares)).sum(-1) * kept).sum() / kept.sum()
    slope = (shares - wanted) * kept[..., None] / kept.sum()
    grad_hidden = np.pad(slope @ head, ((0, 0), (0, 1), (0, 0)))
    return loss, [grad_hidden, np.einsum("btv,btp->vp", slope, hidden[:, :-1])]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits", [37 * 5, 2**24], ids=["chunks", "whole"])
def test_the_loss_in_chunks_is_cross_entropy(backend, monkeypatch, smoothing, logits):
    """Its value and both gradients, in float64, a label left out."""
    losses = importlib.import_module(f"opt_{backend.name}.losses")
    monkeypatch.setattr(losses, "CHUNK", logits)
    rng = np.random.default_rng(0)
    hidden, head = rng.normal(size=(2, 9, 8)), rng.normal(size=(37, 8))
    labels = rng.integers(0, 37, (2, 9))
    labels[0, 3] = losses.IGNORE_INDEX
    loss, gradients = cross_entropy(hidden, head, labels, smoothing)
    plain, _ = backend.differentiate(
        lambda logits: losses.causal_lm(logits, labels, smoothing), hidden @ head.T
    )
    assert abs(plain - loss) < 1e-12
    ours, found = backend.differentiate(
        lambda *given: 3 * losses.chunked_causal_lm(*given, labels, smoothing), hidden, head
    )
    assert abs(ours - 3 * loss) < 1e-12
    for a, b in zip(found, gradients, strict=True):
        assert abs(a - 3 * b).max() < 1e-12


def test_a_padding_token_that_is_read_teaches_its_row_nothing(backend, folder):
    """As PyTorch's `padding_idx`; a head of its own shows what the look-up alone teaches."""
    config = CONFIGS["pre_ln"].replace(num_hidden_layers=1, tie_word_embeddings=False)
    ids = make_prompts(config, 2, 6)
    assert config.pad_token_id is not None
    ids[0, 2] = config.pad_token_id
    found = backend.gradients(backend.load(folder(config)), "causal_lm", input_ids=ids, labels=ids)
    (table,) = (value for name, value in found.items() if name.endswith("embed_tokens.weight"))
    assert not table[config.pad_token_id].any()
    assert table[ids[0, 1]].any()
