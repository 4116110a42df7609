"""Outputs, tokenizers and encodings that `isinstance` takes for ones of `transformers`."""

import copy
import pickle
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from opt_core.generation.outputs import GenerateBeamOutput, GenerateOutput
from opt_core.outputs import ModelOutput
from opt_core.text.encoding import Encoding
from opt_core.text.tokenizer import OPTTokenizer
from opt_core.text.tokenizer_files import LoadedTokenizer


class Base:
    """A stand-in for each of `transformers`' classes."""


class OPTOutput(ModelOutput[Any, Any]):
    """As PyTorch's is called."""


class TFOPTOutput(ModelOutput[Any, Any]):
    """As TensorFlow's is called."""


MODULES = {
    "transformers.utils.generic": ("ModelOutput",),
    "transformers.tokenization_utils_base": ("BatchEncoding",),
    "transformers.tokenization_utils_tokenizers": ("TokenizersBackend",),
    "transformers.generation.utils": (
        "GenerateDecoderOnlyOutput",
        "GenerateBeamDecoderOnlyOutput",
    ),
    "transformers.modeling_outputs": (
        "BaseModelOutputWithPast",
        "CausalLMOutputWithPast",
        "SequenceClassifierOutputWithPast",
        "QuestionAnsweringModelOutput",
    ),
}


@pytest.fixture
def theirs(monkeypatch):
    """Their classes by name, as if they had been imported."""
    made: dict[str, type[Any]] = {}
    for module, names in MODULES.items():
        stand_in: Any = ModuleType(module)
        for name in names:
            bases = (Base,) if module.endswith(("outputs", "generation.utils")) else ()
            made[name] = type(name, bases, {})
            setattr(stand_in, name, made[name])
        monkeypatch.setitem(sys.modules, module, stand_in)
    return made


def tensor(rank: int) -> Any:
    return SimpleNamespace(ndim=rank)


@pytest.mark.parametrize(
    ("name", "out"),
    [
        ("CausalLMOutputWithPast", OPTOutput(logits=tensor(3))),
        ("SequenceClassifierOutputWithPast", OPTOutput(logits=tensor(2))),
        ("BaseModelOutputWithPast", OPTOutput(last_hidden_state=tensor(3))),
        ("QuestionAnsweringModelOutput", OPTOutput(start_logits=tensor(2), end_logits=tensor(2))),
        ("GenerateDecoderOnlyOutput", GenerateOutput(sequences=tensor(2))),
        ("GenerateBeamDecoderOnlyOutput", GenerateBeamOutput(sequences=tensor(2))),
        ("ModelOutput", TFOPTOutput(logits=tensor(3))),
    ],
)
def test_outputs_count_as_theirs_of_the_same_fields(name, out, theirs):
    assert isinstance(out, theirs[name])
    assert isinstance(out, ModelOutput)
    others = theirs.keys() - {name}
    assert not any(isinstance(out, theirs[other]) for other in others)


def test_without_transformers_an_output_is_what_it_is(monkeypatch):
    for module in MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)
    out = OPTOutput(logits=tensor(3))
    assert out.__class__ is type(out) is OPTOutput


def test_outputs_tokenizers_and_encodings_are_copied_and_pickled_as_what_they_are(theirs):
    out = TFOPTOutput(logits=1.0)
    loaded = LoadedTokenizer(None, {"eos_token": "</s>"}, True, "here")  # type: ignore[arg-type]
    tokenizer = OPTTokenizer.from_loaded(loaded)
    assert isinstance(tokenizer, theirs["TokenizersBackend"])
    encoding = Encoding({"input_ids": [2]})
    assert isinstance(encoding, theirs["BatchEncoding"])
    for duplicate in (copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        assert type(duplicate(out)) is TFOPTOutput
        assert duplicate(out) == out
        assert type(duplicate(encoding)) is Encoding
        assert duplicate(encoding) == {"input_ids": [2]}
        again = duplicate(tokenizer)
        assert type(again) is OPTTokenizer
        assert again.eos_token == "</s>"
