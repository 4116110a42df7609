"""Adapters in training: the files that are written, under PEFT's names, and the first values."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.training.lora import (
    Adapter,
    adapter_specs,
    initial_adapter,
    save_adapter,
)

CONFIG = OPTConfig(
    hidden_size=8, num_attention_heads=2, num_hidden_layers=2, ffn_dim=12, vocab_size=20
)
ADAPTER = Adapter(3, 6.0, ("fc1", "q_proj"))
PREFIX = "base_model.model.model.decoder.layers"


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "adapter"
    save_adapter(
        path, CONFIG, "sequence_classification", ADAPTER, lambda s: rng.random(s.shape), "some/base"
    )
    return path


def test_names_are_those_of_peft(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {name: value.shape for name, value in tensors.items()} == {
        **{f"{PREFIX}.{i}.self_attn.q_proj.lora_A.weight": (3, 8) for i in (0, 1)},
        **{f"{PREFIX}.{i}.self_attn.q_proj.lora_B.weight": (8, 3) for i in (0, 1)},
        **{f"{PREFIX}.{i}.fc1.lora_A.weight": (3, 8) for i in (0, 1)},
        **{f"{PREFIX}.{i}.fc1.lora_B.weight": (12, 3) for i in (0, 1)},
        "base_model.model.score.weight": (2, 8),
    }
    about = json.loads((folder / "adapter_config.json").read_text())
    wanted = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "r": 3, "lora_alpha": 6.0, "bias": "none",
        "target_modules": ["fc1", "q_proj"], "modules_to_save": ["score"],
        "base_model_name_or_path": "some/base",
    }  # fmt: skip
    assert wanted.items() <= about.items()


def test_first_values():
    a, b = adapter_specs(CONFIG, 3, ("q_proj",))[:2]
    assert not initial_adapter(b, 0).any()
    value = initial_adapter(a, 0)
    assert value.dtype == np.float32
    assert 0.9 * 8**-0.5 < abs(value).max() <= 8**-0.5
    assert (value == initial_adapter(a, 0)).all()
    assert (value != initial_adapter(a, 1)).any()
    with pytest.raises(ConfigError, match=r"lora_targets: expected some of .* received none"):
        Adapter(2, 1.0, ())
