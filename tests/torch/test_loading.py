"""Weights that come from files and go back to them; heads and devices."""

import math
import warnings

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import opt_torch
from opt_core.errors import CheckpointError, ConfigError
from opt_torch import OPTForCausalLM
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


def test_a_state_dict_in_place_of_a_file(folder, tmp_path):
    path = folder("pre_ln")
    model = OPTForCausalLM.from_pretrained(path)
    ids = torch.tensor([[2, 5, 9]])
    again = OPTForCausalLM.from_pretrained(
        None, config=model.config, state_dict=model.half().state_dict(), torch_dtype="auto"
    )
    assert again.dtype == torch.float16
    assert again.config is not model.config
    assert torch.equal(again.float()(ids).logits, model.float()(ids).logits)
    held = {name: value * 2 for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=held, safe_serialization=False)
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", "generation_config.json", "pytorch_model.bin",
    }  # fmt: skip
    saved = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    doubled = OPTForCausalLM.from_pretrained(tmp_path, use_safetensors=False).state_dict()
    for name, value in saved.items():
        assert torch.equal(doubled[name], value)
        assert torch.equal(held[name], value)
    with pytest.raises(OSError, match=r"use_safetensors: no model\.safetensors"):
        OPTForCausalLM.from_pretrained(tmp_path, use_safetensors=True)
    with pytest.raises(CheckpointError, match="without a folder, pass config= and state_dict="):
        OPTForCausalLM.from_pretrained()


def test_types_and_devices_as_transformers_names_them(folder, tmp_path):
    path = folder("pre_ln")
    for dtype in (torch.bfloat16, "torch.bfloat16", "bfloat16"):
        assert OPTForCausalLM.from_pretrained(path, torch_dtype=dtype).dtype == torch.bfloat16
    assert OPTForCausalLM.from_pretrained(path, dtype=None).dtype == torch.float32
    for device in ("cpu", {"": "cpu"}, torch.device("cpu"), {"model": "cpu", "lm_head": "cpu"}):
        model = OPTForCausalLM.from_pretrained(path, device_map=device)
        assert model.device == torch.device("cpu")
    assert OPTForCausalLM.from_pretrained(path, device_map={"": "meta"}).device.type == "meta"
    with pytest.raises(ConfigError, match="cuda:0"):
        OPTForCausalLM.from_pretrained(path, device_map={"": 0})
    for file in ("config.json", "model.safetensors"):
        name = file.replace(".safe", ".fp16.safe")
        (tmp_path / name).write_bytes((path / file).read_bytes())
    assert OPTForCausalLM.from_pretrained(tmp_path, variant="fp16").num_parameters()


def test_configurations_of_transformers_make_models(folder):
    from transformers import OPTConfig as Theirs

    path = folder("pre_ln")
    config = Theirs.from_pretrained(path)
    ids = torch.tensor([[2, 5, 9]])
    right = OPTForCausalLM.from_pretrained(path)(ids).logits
    for given in (config, config.to_dict(), path, str(path / "config.json")):
        assert torch.equal(OPTForCausalLM.from_pretrained(path, config=given)(ids).logits, right)
    assert OPTForCausalLM(config).config.hidden_size == config.hidden_size
