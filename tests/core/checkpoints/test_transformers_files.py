"""Checkpoints travel both ways between here and `transformers`, and torch's own files are read."""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.checkpoints.load import open_checkpoint, save_checkpoint
from opt_core.checkpoints.plan import LoadPlan, plan_load
from opt_core.config import OPTConfig
from opt_core.params import Head, param_specs
from tests.support.files.checkpoint_fixtures import (
    BARE,
    EMBEDDING,
    PROJECTED,
    TINY,
    UNTIED,
    loaded,
    random_weights,
    write_index,
)

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
pytestmark = pytest.mark.hf

CLASSES: dict[str, Head] = {
    "OPTModel": "none",
    "OPTForCausalLM": "causal_lm",
    "OPTForSequenceClassification": "sequence_classification",
    "OPTForQuestionAnswering": "question_answering",
}
CONFIGS = {"tiny": TINY, "projected": PROJECTED, "bare": BARE, "untied": UNTIED}


def theirs(config: OPTConfig, kind: str = "OPTForCausalLM") -> Any:
    """A `transformers` model in which every parameter is random, norms and biases included."""
    values = {k: v for k, v in config.to_dict().items() if k != "model_type"}
    torch.manual_seed(0)
    model = getattr(transformers, kind)(transformers.OPTConfig(**values)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def outputs(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(2, 9)[None])[0].numpy()


def reload(folder: Path, kind: str) -> Any:
    """`transformers`' model of a folder, which must leave nothing missing or unused."""
    model, report = getattr(transformers, kind).from_pretrained(
        folder, dtype="float32", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def plan(folder: Path, head: Head = "causal_lm") -> LoadPlan:
    config = OPTConfig.from_dict(json.loads((folder / "config.json").read_text()))
    return plan_load(open_checkpoint(folder), config, head)


def assert_holds(result: LoadPlan, model: Any) -> None:
    expected = {
        name if name.startswith(("model.", "lm_head", "score", "qa")) else f"model.{name}": value
        for name, value in model.state_dict().items()
    }
    found = loaded(result)
    for name, array in found.items():
        torch.testing.assert_close(
            torch.from_numpy(array.astype(np.float32)), expected.pop(name).float(), rtol=0, atol=0
        )
    assert expected.keys() <= {"lm_head.weight"}


@pytest.mark.parametrize("size", ["5GB", "1KB"])
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_transformers_saves_loads_here_and_back(tmp_path, config, kind, size):
    model, head = theirs(config, kind), CLASSES[kind]
    model.save_pretrained(tmp_path / "theirs", max_shard_size=size)
    result = plan(tmp_path / "theirs", head)
    assert_holds(result, model)
    assert not result.fresh
    assert result.config.tie_word_embeddings == config.tie_word_embeddings
    fetch = {spec.name: stored.read for spec, stored in result.entries}
    specs = [spec for spec, _ in result.entries]
    save_checkpoint(tmp_path / "ours", result.config, fetch, specs, "float32", size, kind)
    np.testing.assert_array_equal(outputs(reload(tmp_path / "ours", kind)), outputs(model))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_both_ways(tmp_path, dtype):
    model = theirs(TINY).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    result = plan(tmp_path / "theirs")
    assert result.config.dtype == dtype
    assert all(array.dtype.name == dtype for array in loaded(result).values())
    assert_holds(result, model)
    fetch = {spec.name: stored.read for spec, stored in result.entries}
    save_checkpoint(tmp_path / "ours", result.config, fetch, param_specs(TINY), dtype)
    again = transformers.OPTForCausalLM.from_pretrained(tmp_path / "ours", dtype="auto")
    assert again.dtype == getattr(torch, dtype)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=0, atol=0)


def test_casting_rounds_as_torch_does(tmp_path):
    weights = {name: array * 1e-4 for name, array in random_weights().items()}
    fetch = {name: lambda array=array: array for name, array in weights.items()}
    for dtype in ("float16", "bfloat16"):
        save_checkpoint(tmp_path, TINY, fetch, param_specs(TINY), dtype)
        for spec, array in plan(tmp_path).stream("float32"):
            expected = torch.from_numpy(weights[spec.name]).to(getattr(torch, dtype)).float()
            np.testing.assert_array_equal(array, expected.numpy())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_torch_saves_a_state_dict(tmp_path, config, dtype):
    model = theirs(config).to(getattr(torch, dtype))
    config.save_pretrained(tmp_path)
    for content in (
        model.state_dict(),
        dict(model.state_dict()),
        dict(model.named_parameters()),
        {"state_dict": model.state_dict(), "epoch": 3, "losses": [1.5, float("inf")]},
        {name.removeprefix("model."): value for name, value in model.state_dict().items()},
    ):
        for protocol in (2, 4):
            torch.save(content, tmp_path / "pytorch_model.bin", pickle_protocol=protocol)
            result = plan(tmp_path)
            assert_holds(result, model)
            assert result.config.tie_word_embeddings == config.tie_word_embeddings


def test_torch_saves_shards_with_an_index(tmp_path):
    model = theirs(UNTIED)
    UNTIED.save_pretrained(tmp_path)
    weight_map: dict[str, str] = {}
    for i, item in enumerate(model.state_dict().items()):
        shard = f"pytorch_model-0000{i % 3 + 1}-of-00003.bin"
        weight_map[item[0]] = shard
    for shard in set(weight_map.values()):
        part = {n: v.clone() for n, v in model.state_dict().items() if weight_map[n] == shard}
        torch.save(OrderedDict(part), tmp_path / shard)
    write_index(tmp_path / "pytorch_model.bin.index.json", weight_map)
    assert_holds(plan(tmp_path), model)


def test_torch_saves_views(tmp_path):
    state = theirs(TINY).state_dict()
    buffer = torch.randn(21 * 8 + 5)
    state[EMBEDDING] = buffer[5:].view(21, 8)
    state["lm_head.weight"] = state[EMBEDDING]
    for name, value in state.items():
        if value.ndim == 2 and name != EMBEDDING and name != "lm_head.weight":
            state[name] = value.t().contiguous().t()
            assert not state[name].is_contiguous()
    state["model.decoder.layers.0.fc1.bias"] = torch.tensor(2.5).expand(12)
    state["model.decoder.layers.1.fc1.bias"] = torch.randn(36)[::3]
    torch.save(state, tmp_path / "pytorch_model.bin")
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.tensors["lm_head.weight"].is_same_as(checkpoint.tensors[EMBEDDING])
    result = plan_load(checkpoint, TINY, "causal_lm")
    for spec, array in result.stream():
        np.testing.assert_array_equal(array, state[spec.name].numpy())
    fetch = {spec.name: stored.read for spec, stored in result.entries}
    save_checkpoint(tmp_path / "ours", TINY, fetch, param_specs(TINY), "float32")
    for spec, array in plan(tmp_path / "ours").stream():
        np.testing.assert_array_equal(array, state[spec.name].numpy())


def test_a_torch_model_can_live_on_the_map(tmp_path):
    model = theirs(TINY)
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    for _, array in plan(tmp_path).stream():
        tensor = torch.from_numpy(array)
        tensor.mul_(2)  # in place: the map is private
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert (tmp_path / "model.safetensors").read_bytes() == before
