"""A model's output, which is a mapping and counts its fields as `transformers` does."""

import copy
import pickle
from collections import OrderedDict

import pytest

from opt_core.outputs import ModelOutput


class Output(ModelOutput[str, str]):
    """As a backend's is."""


def test_fields_are_read_by_attribute_name_and_number():
    out = Output(loss="l", logits="x", hidden_states=None, attentions=("a",))
    assert isinstance(out, OrderedDict)
    assert (out.loss, out["loss"], out[0]) == ("l", "l", "l")
    loss, logits = out[:2]
    assert (loss, logits) == ("l", "x")
    assert out[-1] == ("a",)
    assert out.to_tuple() == ("l", "x", ("a",))
    assert list(out) == list(out.keys()) == ["loss", "logits", "attentions"]
    assert {**out} == dict(out.items())
    assert len(out) == 3


def test_a_field_that_is_not_there_is_none_and_no_key():
    out = Output(logits="x")
    assert out.hidden_states is None
    assert "hidden_states" not in out
    with pytest.raises(KeyError):
        out["hidden_states"]
    with pytest.raises(AttributeError, match="Output has no field 'logit'"):
        _ = out.logit


def test_fields_are_set_by_attribute_and_name():
    out = Output(logits="x")
    out.loss, out["more"] = "l", 1
    assert (out["loss"], out.more) == ("l", 1)
    out.logits = None
    assert list(out) == ["loss", "more"]


@pytest.mark.parametrize("rebuild", [
    lambda out: type(out)({k: v for k, v in out.items()}),  # noqa: C416  accelerate, the Trainer
    lambda out: type(out)((k, out[k]) for k in out),  # DataParallel
    copy.copy,
    copy.deepcopy,
    lambda out: pickle.loads(pickle.dumps(out)),
])  # fmt: skip
def test_outputs_are_rebuilt(rebuild):
    out = Output(loss="l", logits="x")
    again = rebuild(out)
    assert type(again) is Output
    assert again == out
    assert again.logits == "x"


def test_a_head_puts_its_scores_first():
    out = Output(last_hidden_state="h", past_key_values="p", attentions=("a",))
    headed = out.headed(loss=None, logits="x")
    assert headed == Output(logits="x", past_key_values="p", attentions=("a",))
    assert list(headed) == ["logits", "past_key_values", "attentions"]
