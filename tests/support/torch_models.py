"""Models of PyTorch for its own tests."""

import opt_torch
from opt_core.config import OPTConfig


def model_of(folder, variant: str | OPTConfig = "pre_ln", **options) -> opt_torch.OPTForCausalLM:
    return opt_torch.OPTForCausalLM.from_pretrained(folder(variant), **options)
