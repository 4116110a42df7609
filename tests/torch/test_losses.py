"""The loss under PyTorch's autocast."""

import pytest

torch = pytest.importorskip("torch")


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
