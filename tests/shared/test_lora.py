"""Adapters: the model as it was until they are trained, and the same in every framework."""

import importlib

import numpy as np
import pytest

from opt_core.errors import CheckpointError, ConfigError
from opt_core.params import param_specs
from opt_core.training.lora import Adapter, adapter_specs, save_adapter
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts

CONFIG = CONFIGS["post_ln"].replace(dropout=0.0)
TARGETS = ("k_proj", "fc2")
IDS = make_prompts(CONFIG, 2, 7)


@pytest.fixture
def lora(backend):
    return importlib.import_module(f"opt_{backend.name}.lora")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of an adapter with random values, as training would leave it."""
    path = tmp_path_factory.mktemp("lora") / "adapter"
    adapter = Adapter(3, 6.0, TARGETS)
    rng = np.random.default_rng(0)
    save_adapter(path, CONFIG, "causal_lm", adapter, lambda s: rng.normal(0, 0.2, s.shape), "base")
    return path


def merged_by_hand(folder, adapter):
    """The weights with B A * 2 added, in float64."""
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    low = load_file(adapter / "adapter_model.safetensors")
    for name in list(weights):
        key = "base_model.model." + name.removesuffix("weight")
        if f"{key}lora_A.weight" in low:
            a, b = (low[f"{key}lora_{x}.weight"].astype(np.float64) for x in "AB")
            weights[name] = (weights[name] + 2 * (b @ a)).astype(np.float32)
    return weights


def test_adapters_change_nothing_at_first(backend, lora, folder):
    model = backend.load(folder(CONFIG))
    before = backend.run(model, input_ids=IDS).logits
    adapter = lora.apply(model, 3, 6.0, TARGETS, seed=4)
    assert adapter.scale == 2
    np.testing.assert_array_equal(backend.run(model, input_ids=IDS).logits, before)
    with pytest.raises(ConfigError, match="the model has adapters already"):
        lora.apply(model, 2)
    with pytest.raises(ConfigError, match="lora_targets: expected some of"):
        lora.apply(backend.load(folder(CONFIG)), 2, 1.0, ("score",))
    with pytest.raises(ConfigError, match="the model has no adapters to save"):
        lora.save_adapter(backend.load(folder(CONFIG)), folder(CONFIG) / "none")


def test_merged_unmerged_and_by_hand(backend, lora, folder, trained, tmp_path):
    path = folder(CONFIG)
    model = backend.load(path)
    plain = backend.run(model, input_ids=IDS).logits
    lora.load_adapter(model, trained)
    beside = backend.run(model, input_ids=IDS).logits
    assert abs(beside - plain).max() > 1e-2
    with pytest.raises(CheckpointError, match="the model has adapters: merge them first"):
        model.save_pretrained(tmp_path / "unmerged")
    lora.merge(model)
    np.testing.assert_allclose(backend.run(model, input_ids=IDS).logits, beside, atol=2e-5)
    model.save_pretrained(tmp_path / "merged")
    from safetensors.numpy import load_file

    saved, wanted = load_file(tmp_path / "merged/model.safetensors"), merged_by_hand(path, trained)
    assert saved.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(saved[name], value, atol=1e-6, err_msg=name)
    lora.unmerge(model)
    np.testing.assert_array_equal(backend.run(model, input_ids=IDS).logits, beside)
    checkpoint = importlib.import_module(f"opt_{backend.name}.checkpoint")
    original = load_file(path / "model.safetensors")
    for spec in param_specs(CONFIG):
        value = backend.numpy(checkpoint.get_parameter(model, spec))
        np.testing.assert_array_equal(value, original[spec.name])
    lora.save_adapter(model, tmp_path / "again", "base")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (trained / name).read_bytes()


def test_on_half_precision(backend, lora, folder, trained):
    """The adapter works in float32 beside weights in bfloat16, and leaves them as they were."""
    model = backend.load(folder(CONFIG), dtype="bfloat16")
    checkpoint = importlib.import_module(f"opt_{backend.name}.checkpoint")
    spec = next(s for s in param_specs(CONFIG) if s.name.endswith("k_proj.weight"))

    def weight():
        value = checkpoint.get_parameter(model, spec)
        return np.asarray(value.float() if backend.name == "torch" else value, np.float32)

    before = weight()
    lora.load_adapter(model, trained)
    for one in adapter_specs(CONFIG, 3, TARGETS)[:2]:
        assert "float32" in str(checkpoint.get_parameter(model, one).dtype)
    lora.merge(model)
    assert (weight() != before).any()
    lora.unmerge(model)
    np.testing.assert_array_equal(weight(), before)
