"""A live model of one backend becomes one of another: the same weights, the same answers."""

from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import conversion
import opt_torch
from conversion.backends import inference, load_backend, to_numpy
from opt_core.errors import CheckpointError, InputError
from opt_core.training.lora import Adapter, save_adapter
from tests.support.backends import BACKENDS, CLASSES
from tests.support.configs import CONFIGS

IDS = np.array([[2, 5, 9, 20, 3, 7]])
TOLERANCE = 1e-5
"""|difference| of two backends in float32."""


def to(backend: str, model: Any) -> Any:
    return getattr(conversion, f"to_{backend}")(model)


def answer(backend: str, model: Any) -> np.ndarray:
    with inference(backend):
        output = model(IDS)
    names = ("logits", "start_logits", "last_hidden_state")
    return to_numpy(next(getattr(output, name) for name in names if hasattr(output, name)))


def assert_same_weights(a: Any, b: Any) -> None:
    state = a.state_dict()
    assert b.state_dict().keys() == state.keys()
    for name, tensor in b.state_dict().items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor, state[name]), name


# A pair is the reader of one backend and the writer of another: every pair for one model, and for
# the others those without torch, which stands at both ends anyway.
CASES = [
    (a, b, name, head)
    for a, b, name, head in product(BACKENDS, BACKENDS, CONFIGS, CLASSES)
    if (name, head) == ("pre_ln", "causal_lm") or len({"torch", a, b}) == len(BACKENDS)
]


@pytest.mark.parametrize(("a", "b", "name", "head"), CASES)
def test_every_pair_of_backends(a: str, b: str, name: str, head: Any):
    original = getattr(opt_torch, CLASSES[head])(CONFIGS[name], seed=3)
    first = to(a, original)
    second = to(b, first)
    assert isinstance(second, load_backend(b, CLASSES[head]))
    assert_same_weights(original, to("torch", second))
    np.testing.assert_allclose(answer(b, second), answer(a, first), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_types_settings_and_memory_are_its_own(backend: str):
    original = opt_torch.OPTForCausalLM(CONFIGS["pre_ln"], seed=3).to(torch.bfloat16)
    original.generation_config = original.generation_config.replace(max_new_tokens=3)
    new = to(backend, original)
    assert str(new.dtype).endswith("bfloat16")
    assert new.generation_config == original.generation_config
    back = to("torch", new)
    assert_same_weights(original, back)
    assert back.lm_head.weight is back.get_decoder().embed_tokens.weight
    with torch.no_grad():
        back.lm_head.weight.zero_()
    assert_same_weights(original, to("torch", new))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_that_was_untied_stays_so(backend: str):
    original = opt_torch.OPTForCausalLM(CONFIGS["pre_ln"], seed=3)
    original.lm_head.weight = torch.nn.Parameter(original.lm_head.weight * 2)
    new = to(backend, original)
    assert not new.config.tie_word_embeddings
    assert torch.equal(to("torch", new).lm_head.weight, original.lm_head.weight)


@pytest.mark.parametrize("backend", BACKENDS)
def test_adapters_are_merged_first(backend: str, tmp_path: Path):
    """Without them the new model would be another one, and nothing would tell."""
    lora, config = import_module(f"opt_{backend}.lora"), CONFIGS["pre_ln"]
    rng, adapter = np.random.default_rng(0), Adapter(2, 4.0, ("fc1",))
    values = lambda spec: rng.normal(0, 0.2, spec.shape)  # noqa: E731
    save_adapter(tmp_path / "adapter", config, "causal_lm", adapter, values, "base")
    original = opt_torch.OPTForCausalLM(config, seed=3)
    model = to(backend, original)
    lora.load_adapter(model, tmp_path / "adapter")
    for other in BACKENDS:
        with pytest.raises(CheckpointError, match=f"to_{other}: the model has adapters: merge"):
            to(other, model)
    lora.merge(model)
    new = to("torch", model)
    np.testing.assert_allclose(answer("torch", new), answer(backend, model), rtol=0, atol=TOLERANCE)
    assert np.abs(answer("torch", new) - answer("torch", original)).max() > 100 * TOLERANCE


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match="expected one of opt_torch"):
        conversion.to_torch(torch.nn.Linear(2, 2))
