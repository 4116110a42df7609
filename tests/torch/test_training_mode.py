"""Dropout, activations that are computed again, and training after generation."""

import itertools

import pytest

pytest.importorskip("torch")

import torch

from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.tiers import tiered
from tests.support.torch_models import model_of


def test_dropout_is_on_in_training_mode_only(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 9)
    still = model(ids).logits
    torch.testing.assert_close(model(ids).logits, still, rtol=0, atol=0)
    model.train()
    torch.manual_seed(0)
    first, second = model(ids).logits, model(ids).logits
    assert (first - second).abs().max() > 0.1
    torch.manual_seed(0)
    torch.testing.assert_close(model(ids).logits, first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("where", "attention_implementation"),
    tiered(  # only attention weights are dropped where attention is computed
        itertools.product(["dropout", "attention_dropout", "layerdrop"], ["sdpa", "eager"]),
        lambda where, attention: attention == "sdpa" or where == "attention_dropout",
    ),
)
def test_each_dropout_field_acts(folder, where, attention_implementation):
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    config = CONFIGS["pre_ln"].replace(**{**silent, where: 0.5})
    model = model_of(folder, config, attn_implementation=attention_implementation).train()
    ids = make_prompts(config, 1, 9)
    torch.manual_seed(0)
    outputs = torch.stack([model(ids).logits for _ in range(12)])
    assert outputs.std(0).max() > 0.01
    quiet = model_of(folder, config.replace(**silent)).train()(ids).logits
    assert (outputs.mean(0) - quiet).abs().max() < 6 * outputs.std(0).max()


@pytest.mark.parametrize("variant", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(folder, variant):
    ids = make_prompts(CONFIGS[variant], 2, 9)
    grads = []
    for recompute in (False, True):
        model = model_of(folder, variant).train()
        if recompute:
            model.gradient_checkpointing_enable()
        torch.manual_seed(0)
        model(ids, labels=ids).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
        model.gradient_checkpointing_disable()
        assert not model.get_decoder().gradient_checkpointing
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=0, msg=name)


def test_gradient_checkpointing_really_recomputes(folder):
    model = model_of(folder).train()
    calls = []
    fc1 = model.get_decoder().get_submodule("layers.0.fc1")
    fc1.register_forward_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing_enable()
    ids = make_prompts(CONFIGS["pre_ln"], 1, 4)
    model(ids, labels=ids).loss.backward()
    assert len(calls) == 2


def test_generation_leaves_training_possible(folder):
    """Generated ids are ordinary tensors, usable in a graph."""
    model = model_of(folder)
    ids = make_prompts(CONFIGS["pre_ln"], 1, 4)
    out = model.generate(ids, max_new_tokens=3, eos_token_id=None)
    streamed = torch.stack(list(model.stream(ids, max_new_tokens=3, eos_token_id=None)), 1)
    beams = model.generate(ids, max_new_tokens=3, eos_token_id=None, num_beams=2)
    for text in (out, streamed, beams):
        model(text, labels=text).loss.backward()
