"""Adapter files: PEFT's names and settings, and what does not fit refused in one line.

That PEFT 0.21 reads these files, and we its own, with equal logits, was tried with live models; the
names below are what it wrote.
"""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, ConfigError
from opt_core.training.lora import (
    Adapter,
    adapter_specs,
    initial_adapter,
    read_adapter,
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


def test_what_is_written_is_read(folder):
    adapter, values = read_adapter(folder, CONFIG, "sequence_classification")
    assert adapter == ADAPTER
    tensors = load_file(folder / "adapter_model.safetensors")
    assert values.keys() == {name.removeprefix("base_model.model.") for name in tensors}
    for name, value in values.items():
        np.testing.assert_array_equal(value, tensors[f"base_model.model.{name}"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', found 'IA3'"),
        ({"use_dora": True}, "use_dora=true is not supported"),
        ({"rank_pattern": {"fc1": 4}}, "rank_pattern="),
        ({"bias": "all"}, "bias: expected 'none', found 'all'"),
        ({"target_modules": "all-linear"}, "target_modules: expected a list"),
        ({"target_modules": ["lm_head"]}, "lora_targets: expected some of"),
        ({"r": 0}, "rank: expected an integer >= 1"),
        ({"r": 4}, "does not fit the model: base_model.*lora_A.weight: expected .4, 8., found"),
        ({"target_modules": ["fc1"]}, "does not fit the model: unexpected .*q_proj"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(folder, changes, message):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        read_adapter(folder, CONFIG, "sequence_classification")


def test_missing_files_and_tensors(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: no such file"):
        read_adapter(tmp_path, CONFIG, "causal_lm")
    with pytest.raises(CheckpointError, match=r"unexpected base_model\.model\.score"):
        read_adapter(folder, CONFIG, "causal_lm")
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.score.weight"]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"missing base_model\.model\.score"):
        read_adapter(folder, CONFIG, "sequence_classification")


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
