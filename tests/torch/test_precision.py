"""Types of weights."""

import pytest

pytest.importorskip("torch")

import torch

import opt_torch
from opt_core.errors import CheckpointError, ConfigError
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.torch_models import model_of


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_half_precision_is_near_and_finite(folder, variant, dtype):
    ids, mask = make_prompts(CONFIGS[variant], 3, 9), make_mask("left", [9, 5, 2])
    half = model_of(folder, variant, dtype=dtype)
    assert half.dtype == getattr(torch, dtype)
    logits = half(ids, attention_mask=mask).logits.float()
    full = model_of(folder, variant)(ids, attention_mask=mask).logits
    assert torch.isfinite(logits).all()
    seen = torch.tensor(mask).bool()
    assert (logits - full)[seen].abs().max() < (0.8 if dtype == "bfloat16" else 0.1)


def test_dtype_auto_is_the_stored_one(folder, tmp_path):
    model_of(folder).bfloat16().save_pretrained(tmp_path)
    loaded = opt_torch.OPTForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.dtype == "bfloat16"
    named = opt_torch.OPTForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert named.dtype == torch.float16
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        opt_torch.OPTForCausalLM.from_pretrained(tmp_path, dtype="fp16")


def test_values_beyond_float16_are_refused(folder, tmp_path):
    model = model_of(folder)
    with torch.no_grad():
        model.get_decoder().layers[0].get_parameter("fc2.weight").mul_(1e8)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc2\.weight: values beyond the range"):
        opt_torch.OPTForCausalLM.from_pretrained(tmp_path, dtype="float16")
