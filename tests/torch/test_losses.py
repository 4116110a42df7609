"""What only PyTorch's training has: a loss that never holds all logits."""

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from opt_torch import losses  # noqa: E402


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("logits", [37 * 5, 2**24], ids=["chunks", "whole"])
def test_the_loss_in_chunks_is_cross_entropy(monkeypatch, smoothing, logits):
    """Its value and both gradients, in float64, a label left out."""
    monkeypatch.setattr(losses, "CHUNK", logits)
    generator = torch.Generator().manual_seed(0)
    hidden, head = (
        torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 9, 8), (37, 8))
    )
    labels = torch.randint(0, 37, (2, 9), generator=generator)
    labels[0, 3] = losses.IGNORE_INDEX
    ours = losses.chunked_causal_lm(hidden, head, labels, smoothing)
    theirs = F.cross_entropy(
        (hidden @ head.T)[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing
    )
    assert (ours - theirs).abs() < 1e-12
    for a, b in zip(
        torch.autograd.grad(3 * ours, [hidden, head]),
        torch.autograd.grad(3 * theirs, [hidden, head]),
        strict=True,
    ):
        assert (a - b).abs().max() < 1e-12


def test_mixed_precision_is_near(folder):
    """Products in bfloat16, weights and gradients in float32."""
    from opt_torch import OPTForCausalLM
    from opt_torch.training import compute_loss
    from tests.support.configs import CONFIGS
    from tests.support.reference import make_prompts

    config = CONFIGS["pre_ln"].replace(dropout=0.0)
    model, ids = OPTForCausalLM.from_pretrained(folder(config)), make_prompts(config, 2, 9)
    plain = compute_loss(model, ids)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = compute_loss(model, ids)
    mixed.backward()
    assert 0 < (mixed - plain).abs() < 0.05 * plain
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
