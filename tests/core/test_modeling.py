"""The neutral half of the models, with a backend of plain Python in place of a framework's."""

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest

from opt_core.compatibility.caches import CacheMixin
from opt_core.config import OPTConfig
from opt_core.decoder import DecoderLayerMixin, DecoderMixin
from opt_core.errors import ConfigError, InputError
from opt_core.modeling import (
    Backend,
    CausalLMMixin,
    PreTrainedMixin,
    QuestionAnsweringMixin,
    SequenceClassificationMixin,
)
from opt_core.outputs import ModelOutput
from tests.support.files.checkpoint_fixtures import TINY


class Decoder:
    gradient_checkpointing = False

    def embed_tokens(self, ids: Any) -> Any:
        return SimpleNamespace(shape=(1, len(ids), 4), ids=ids)

    def __call__(self, embeds: Any, **options: Any) -> ModelOutput[Any, Any]:
        return ModelOutput(last_hidden_state=(embeds, options))


class Cache(CacheMixin):
    """One that is only asked for its length."""

    def __init__(self, length: int):
        self.length = length

    keys, grows = (), False


class Inputs:
    """Records what is checked."""

    KVCache = Cache
    windows: list[Any] = []  # noqa: RUF012

    @staticmethod
    def full_mask(mask: Any, count: int, cache: Any) -> Any:
        return mask and (mask, count)

    @classmethod
    def check_window(cls, config: OPTConfig, mask: Any, length: int) -> None:
        cls.windows.append((mask, length))


class Model(PreTrainedMixin[Decoder]):
    head = "none"
    backend = Backend(
        SimpleNamespace(IMPLEMENTATIONS=("eager", "sdpa")),
        SimpleNamespace(save_pretrained=lambda *values: values),
        Inputs,
        SimpleNamespace(causal_lm=lambda *values, **options: (*values, options)),
        loop=None,
        beam=None,
        speculative=None,
        sampling=None,
        prefill=None,
    )

    def __init__(self, config: OPTConfig, attn_implementation: str = "sdpa"):
        self._configure(config, attn_implementation)
        self.decoder = Decoder()

    def _check_inputs(self, *inputs: Any) -> Any:
        return inputs

    def _trains(self, **mode: Any) -> bool:
        return True


def test_an_unknown_attention_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="expected one of eager, sdpa, received 'flash'"):
        Model(TINY, "flash")


def test_the_decoder_is_found_by_the_head():
    model = Model(TINY)
    assert model.get_decoder() is model.decoder
    outer = SimpleNamespace(head="causal_lm", model=model)
    assert PreTrainedMixin.get_decoder(outer) is model.decoder  # type: ignore[arg-type]
    model.gradient_checkpointing_enable()
    assert model.decoder.gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.decoder.gradient_checkpointing


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_models_are_copied_and_pickled_as_their_framework_does_it(duplicate):
    model = Model(TINY)
    for other in (duplicate(model), pickle.loads(pickle.dumps(model))):
        assert other.config == model.config
        assert other.backend is model.backend  # of the class: no module is ever pickled
        assert "backend" not in vars(other)


def test_decoding_checks_the_window_unless_positions_are_given():
    model, ids = Model(TINY), [5, 6, 7]
    Inputs.windows.clear()
    given = ids, "mask", None, None, Cache(4)
    out = model._decode(given, {"output_hidden_states": True}, flag=True)
    embeds, options = out.last_hidden_state
    assert embeds.ids == ids
    assert options["mask_BS"] == ("mask", 3)
    assert options["flag"]
    assert options["output_hidden_states"]
    assert not options["output_attentions"]
    assert Inputs.windows == [(("mask", 3), 7)]
    given = None, None, "positions", SimpleNamespace(shape=(1, 2, 4)), None
    model._decode(given, {})
    assert len(Inputs.windows) == 1


class Language(CausalLMMixin, Model):
    def compute_logits(self, hidden: Any) -> Any:
        return hidden


class Slices:
    """Gives back what it is indexed with."""

    def __getitem__(self, key: Any) -> Any:
        return key


def test_the_language_models_head():
    assert Language.head == "causal_lm"
    model, states = Language(TINY), ModelOutput(last_hidden_state=Slices())
    out = model._finish(states, {}, None, 2)
    assert out == {"logits": (slice(None), slice(-2, None))}
    out = model._finish(states, {"num_items_in_batch": 7}, "labels", 0)
    assert out.loss == (out.logits, "labels", {"items": 7})
    with pytest.raises(InputError, match="logits_to_keep: expected at least 0, received -1"):
        model._finish(states, {}, None, -1)


class Classifier(SequenceClassificationMixin, Model):
    score = staticmethod(lambda states: ("score", states))

    def _pick(self, hidden_BTP: Any, index_B: Any) -> Any:
        return hidden_BTP, index_B


def test_the_classifier_scores_the_last_token(monkeypatch):
    losses = SimpleNamespace(last_token=lambda *values: values, classification=lambda *v: v)
    monkeypatch.setattr(Classifier, "backend", Model.backend._replace(losses=losses))
    model = Classifier(TINY)
    states = ModelOutput(last_hidden_state="states")
    out = model._finish(states, {}, "ids", None)
    assert out == {"logits": ("score", ("states", ("ids", "states", TINY.pad_token_id)))}
    assert model._finish(states, {}, "ids", "labels").loss == (out.logits, "labels", TINY)


@pytest.mark.parametrize(
    ("norm_first", "expected"), [(True, 3 + 5 * 30), (False, (3 + 5 * 3) * 10)]
)
def test_norms_stand_before_a_part_or_behind_the_sum(norm_first, expected):
    layer = DecoderLayerMixin()
    layer.norm_first = norm_first
    found = layer._residual(3, lambda x: x * 10, lambda x: (x * 5, "rest"))
    assert found == (expected, "rest")


@pytest.mark.parametrize("has", [True, False])
def test_projections_and_the_last_norm_are_there_or_not(has):
    decoder = DecoderMixin()
    decoder.project_in = decoder.final_layer_norm = (lambda x: x + 1) if has else None
    decoder.project_out = (lambda x: x * 10) if has else None
    decoder.embed_positions = lambda rows, past: rows * 100
    assert decoder._enter(5, 2) == 205 + has
    assert decoder._leave(5) == (60 if has else 5)


def test_both_positions_of_an_answer_belong_together():
    assert (QuestionAnsweringMixin.head, SequenceClassificationMixin.head) == (
        "question_answering",
        "sequence_classification",
    )
    with pytest.raises(InputError, match="belong together, received one"):
        QuestionAnsweringMixin()._finish(ModelOutput(), {}, 1, None)
