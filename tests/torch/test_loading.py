"""Weights that come from files and go back to them; heads and devices."""

import math
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import opt_torch
from opt_core.errors import ConfigError
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.torch_models import model_of


def test_weights_stay_in_the_file_until_changed(folder):
    model = model_of(folder)
    before = (folder("pre_ln") / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    assert (folder("pre_ln") / "model.safetensors").read_bytes() == before


def test_a_head_can_be_left_behind(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = folder("post_ln", "sequence_classification")
        model = opt_torch.OPTForCausalLM.from_pretrained(path)
    assert math.isfinite(model(np.array([[2, 5, 6]]), labels=np.array([[2, 5, 6]])).loss.item())


def test_a_replaced_head_is_saved(folder, tmp_path):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 5)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(99, 32))
    model.save_pretrained(tmp_path)
    again = opt_torch.OPTForCausalLM.from_pretrained(tmp_path)
    assert not again.config.tie_word_embeddings
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("device", ["nowhere", "cuda:99", "mps:0"])
def test_a_device_that_is_not_there(folder, device):
    with pytest.raises(ConfigError, match=f"device: '{device}' cannot be used here"):
        model_of(folder, device=device)
