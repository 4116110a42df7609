"""Every public name of the live transformers' OPT classes is here, or on the migration page."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

import torch

import opt_torch
from opt_core import GenerationConfig, OPTConfig, OPTTokenizer
from tests.support.configs import CONFIGS
from tests.support.source_tree import ROOT

transformers = pytest.importorskip("transformers")
HEADS = (
    "OPTModel",
    "OPTForCausalLM",
    "OPTForSequenceClassification",
    "OPTForQuestionAnswering",
)
PAGE = Path(ROOT, "docs", "migration.md").read_text("utf-8")
WORDS = {word for code in re.findall(r"`([^`]+)`", PAGE) for word in re.findall(r"\w+", code)}
CALLS = {
    *("args", "kwargs", "self", "model_args", "init_inputs", "deprecated_kwargs", "config_kwargs"),
    *("key", "default", "other", "kwds"),  # a dictionary's own
}


def pairs() -> dict[str, tuple[Any, Any]]:
    config = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
    given = transformers.OPTConfig(**{k: v for k, v in config.to_dict().items() if k != "dtype"})
    found = {
        name: (getattr(transformers, name)(given), getattr(opt_torch, name)(config))
        for name in HEADS
    }
    tokenizer = OPTTokenizer.from_pretrained("mini")
    ids = torch.tensor([[2, 5, 6]])
    with torch.no_grad():
        outputs = [model(ids) for model in found["OPTForCausalLM"]]
    return {
        **found,
        "OPTConfig": (given, OPTConfig()),
        "GenerationConfig": (transformers.GenerationConfig(), GenerationConfig()),
        "GPT2Tokenizer": (transformers.GPT2Tokenizer, tokenizer),
        "PreTrainedTokenizerFast": (transformers.PreTrainedTokenizerFast, tokenizer),
        "BatchEncoding": (transformers.BatchEncoding, tokenizer("a")),
        "Cache": (transformers.DynamicCache, outputs[1].past_key_values),
        "output": tuple(outputs),
    }


PAIRS = pairs()


def public(of: Any) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


def parameters(function: Any) -> set[str]:
    try:
        return set(inspect.signature(function).parameters) - CALLS
    except (TypeError, ValueError):
        return set()


@pytest.mark.parametrize("name", PAIRS)
def test_every_name_is_here_or_on_the_page(name):
    theirs, ours = PAIRS[name]
    expected = public(theirs) - public(torch.nn.Module())
    assert len(expected) > 10
    missing = sorted(n for n in expected if not hasattr(ours, n) and n not in WORDS)
    assert missing == [], f"{name}: neither here nor in docs/migration.md"


@pytest.mark.parametrize("name", PAIRS)
def test_every_argument_is_here_or_on_the_page(name):
    theirs, ours = PAIRS[name]
    missing = []
    for method in sorted(public(theirs) - public(torch.nn.Module()) | {"forward", "__call__"}):
        their, our = getattr(theirs, method, None), getattr(ours, method, None)
        if not inspect.isroutine(their) or not callable(our):
            continue
        refuses = " is not supported" in str(getattr(our, "__doc__", "")) or (
            str(getattr(our, "__doc__", "")).startswith("Refused")
        )
        names = parameters(their) - parameters(our) - WORDS
        missing += [f"{method}({argument}=)" for argument in sorted(names) if not refuses]
    assert missing == [], f"{name}: neither taken nor in docs/migration.md"


def test_every_setting_of_generation_can_be_set_to_its_default():
    """Files of `transformers` are taken."""
    theirs = transformers.GenerationConfig()
    for name, value in theirs.to_dict().items():
        settings = GenerationConfig()
        setattr(settings, name, value)
        assert settings.refused == (), name
        assert getattr(settings, name, None) == value or value is None, name
