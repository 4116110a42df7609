"""Intents of the tests of `transformers`' OPT, in words of our own, on every backend."""

import json

import numpy as np
import pytest

from opt_core import GenerationConfig
from opt_core.compatibility.caches import REFUSED as CACHE_REFUSED
from opt_core.compatibility.names import REFUSED
from opt_core.compatibility.subclasses import make_model
from opt_core.errors import ArgumentError, GenerationError, InputError, UnsupportedError
from opt_core.generation.outputs import Later
from opt_core.params import POSITION_OFFSET
from tests.support.backends import ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts

pytestmark = pytest.mark.dealt

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
IDS = make_prompts(CONFIG, 2, 6)
NEW = 3
SETTINGS = {"max_new_tokens": NEW, "do_sample": False}
"""The same in all tests, so that little is compiled."""


@pytest.fixture(scope="module")
def models(folder):
    """Each backend's model, loaded once."""
    return {}


@pytest.fixture
def model(backend, folder, models):
    if backend.name not in models:
        models[backend.name] = backend.load(folder(CONFIG))
    return models[backend.name]


@pytest.fixture
def greedy(backend, model):
    return backend.generate(model, IDS, **SETTINGS)


def test_fields_stand_in_transformers_order(backend, model):
    out = backend.call(
        model, input_ids=IDS, labels=IDS, use_cache=True, output_attentions=True,
        output_hidden_states=True,
    )  # fmt: skip
    order = ["loss", "logits", "past_key_values", "hidden_states", "attentions"]
    assert list(out) == order
    assert out[-1] is out.attentions
    assert out[2] is out.cache is out["cache"] is out.past_key_values
    again = backend.run(model, input_ids=IDS[:, -1:], cache=out.cache)
    assert again.logits.shape == (2, 1, CONFIG.vocab_size)


def test_a_cache_reads_as_transformers_does_and_stays_a_value(backend, model):
    cache = backend.call(model, input_ids=IDS, use_cache=True).past_key_values
    shape = (2, CONFIG.num_attention_heads, 6, CONFIG.head_dim)
    assert tuple(cache.layers[0].keys.shape) == tuple(cache.key_cache[0].shape) == shape
    again = type(cache).from_legacy_cache(cache.to_legacy_cache())
    assert (int(again.seen_tokens), again.get_max_length()) == (6, None)
    assert tuple(cache.layers[-1].values.shape) == tuple(cache.value_cache[-1].shape) == shape
    in_place = ("reorder_cache", "batch_select_indices", "batch_repeat_interleave", "reset")
    for name in CACHE_REFUSED.keys() - (in_place if backend.name == "torch" else ()):
        with pytest.raises(InputError, match=f"{name}: a cache is not changed in place; "):
            getattr(cache, name)(np.array([0]))


def test_names_that_libraries_look_at(model):
    assert model.num_labels == CONFIG.num_labels
    assert model._no_split_modules == ["OPTDecoderLayer"]
    assert (model.is_parallelizable, model.supports_tp_plan, model.is_remote_code()) == (False,) * 3
    assert model.generation_config_class is GenerationConfig
    for name in REFUSED:
        with pytest.raises(UnsupportedError, match=rf"\.{name} is not supported: \w+"):
            getattr(model, name)()


def test_activations_may_be_checkpointed_under_either_name(model):
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=None)
    assert model.is_gradient_checkpointing
    model.activation_checkpointing_disable()
    with pytest.raises(ValueError, match="every_n_layers=1 and offload=False, received 2 and"):
        model.activation_checkpointing_enable(every_n_layers=2)


class Theirs:
    """Settings as another library's object holds them."""

    max_new_tokens = NEW

    def to_diff_dict(self):
        return {"max_new_tokens": self.max_new_tokens, "transformers_version": "5.24.0"}


def test_settings_of_another_library_are_taken(backend, model, greedy):
    for given in (Theirs(), {"max_new_tokens": NEW}):
        np.testing.assert_array_equal(backend.generate(model, IDS, generation_config=given), greedy)
    own, model.generation_config = model.generation_config, Theirs()
    try:
        np.testing.assert_array_equal(backend.generate(model, IDS), greedy)
    finally:
        model.generation_config = own


def test_arguments_that_change_nothing_are_taken(backend, model, greedy):
    positions = np.arange(6, dtype=np.int32)[None].repeat(2, 0)
    found = backend.generate(
        model, IDS, token_type_ids=np.zeros_like(IDS), labels=IDS, logits_to_keep=1,
        position_ids=positions, cache_implementation="static", trace=True,
        custom_generate="contrastive-search", **SETTINGS,
    )  # fmt: skip
    np.testing.assert_array_equal(found, greedy)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"position_ids": np.zeros_like(IDS)}, "position_ids: generate counts positions from"),
        ({"head_mask": [[1]]}, "generate takes no head_mask"),
        ({"custom_generate": "me/mine"}, "custom_generate: the code of 'me/mine' is not run"),
        ({"assistant_tokenizer": object()}, "assistant_tokenizer: pass tokenizer= too"),
        ({"cache_implementation": "fast"}, "cache_implementation: expected one of dynamic"),
        ({"foo": 1}, "unknown generation option 'foo'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be_honoured_are_refused(model, given, message):
    with pytest.raises(GenerationError, match=message):
        model.generate(IDS, **SETTINGS, **given)


def test_a_text_begins_with_bos_unless_there_is_none(model):
    with pytest.raises(GenerationError, match="no bos_token_id to begin with"):
        model.generate(bos_token_id=None, **SETTINGS)


def test_prefixes_are_caches_of_any_kind(backend, model, greedy):
    held = backend.call(model, input_ids=IDS[:, :4], use_cache=True).past_key_values
    pairs = held.to_legacy_cache()
    for past in (held, pairs, list(pairs), ()):
        found = backend.generate(model, IDS, past_key_values=past, **SETTINGS)
        np.testing.assert_array_equal(found, greedy)


def test_ways_to_generate_of_ones_own(backend, model, greedy):
    """The filters and ends of the request are at hand, as `transformers` gives them."""

    def likeliest(model, input_ids, logits_processor, stopping_criteria, generation_config, **more):
        assert set(more) == {"attention_mask"}
        assert generation_config.max_length == 6 + NEW
        ids, ended = input_ids, False
        while not ended:
            logits = backend.call(model, input_ids=backend.to_array(ids), use_cache=False).logits
            scores = logits_processor(ids, logits[:, -1])
            new = backend.to_array(scores).argmax(-1)[:, None]
            ids = backend.array(np.concatenate([backend.to_array(ids), new], 1).astype(np.int32))
            ended = backend.to_array(stopping_criteria(ids, scores)).all()
        return ids

    found = model.generate(IDS, custom_generate=likeliest, eos_token_id=None, **SETTINGS)
    np.testing.assert_array_equal(
        backend.to_array(found), backend.generate(model, IDS, eos_token_id=None, **SETTINGS)
    )
    banned = int(greedy[0, 6])
    kept = model.generate(IDS, custom_generate=likeliest, suppress_tokens=[banned], **SETTINGS)
    assert banned not in backend.to_array(kept)[:, 6:]


def test_a_configuration_may_say_how_to_generate(backend, folder, tmp_path):
    model = backend.load(folder(CONFIG))
    model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"max_length": 9, "num_beams": 2}))
    settings = backend.load(tmp_path).generation_config
    assert (settings.max_length, settings.num_beams) == (9, 2)
    assert settings.eos_token_id == CONFIG.eos_token_id


def test_the_cache_of_a_generation_as_tuples(backend, model):
    options = {"return_dict_in_generate": True, "output_scores": True, **SETTINGS}
    found = model.generate(IDS, return_legacy_cache=True, **options).past_key_values
    assert isinstance(found, tuple)
    shape = (2, CONFIG.num_attention_heads, 6 + NEW - 1, CONFIG.head_dim)
    assert [tuple(x.shape) for x in found[0]] == [shape, shape]
    cache = model.generate(IDS, **options).past_key_values
    with pytest.raises(InputError, match="a cache is indexed by the layer's number, received 'mo"):
        cache["model"]


def test_states_of_a_generation_without_cache_are_refused(model):
    options = {"return_dict_in_generate": True, "use_cache": False, **SETTINGS}
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(GenerationError, match="use_cache=False: each step's hidden states and"):
            model.generate(IDS, **{name: True}, **options)


def test_parts_have_transformers_names_too(model):
    decoder = model.get_decoder()
    assert (decoder.vocab_size, decoder.padding_idx) == (CONFIG.vocab_size, CONFIG.pad_token_id)
    assert decoder.max_target_positions == CONFIG.max_position_embeddings
    assert (decoder.dropout, decoder.layerdrop) == (CONFIG.dropout, CONFIG.layerdrop)
    layer = decoder.layers[0]
    assert layer.do_layer_norm_before is CONFIG.do_layer_norm_before
    assert layer.activation_fn is layer.activation
    attention = layer.self_attn
    assert layer.embed_dim == attention.embed_dim == CONFIG.hidden_size
    assert attention.scaling == CONFIG.head_dim**-0.5
    assert decoder.embed_positions.offset == POSITION_OFFSET
    assert model._supports_logits_to_keep()


def test_a_decoder_called_as_a_model_says_which_model(model):
    decoder = model.get_decoder()
    for call in (lambda: decoder(IDS), lambda: decoder(input_ids=IDS)):
        with pytest.raises(ArgumentError, match=r"Decoder: the decoder takes .* model\.model\("):
            call()


def test_a_class_of_ones_own_takes_the_configuration_alone(backend, folder):
    base = type(backend.load(folder(CONFIG)))

    class Scored(base):
        def __init__(self, config):
            super().__init__(config)
            self.kept = config.hidden_size

    made = Scored.from_pretrained(folder(CONFIG), attn_implementation="eager")
    assert (made.kept, made.attn_implementation) == (CONFIG.hidden_size, "eager")
    expected = backend.run(backend.load(folder(CONFIG)), input_ids=IDS).logits
    np.testing.assert_allclose(backend.run(made, input_ids=IDS).logits, expected, atol=1e-5)
    with pytest.raises(ArgumentError, match=r"Scored\.__init__ takes no quantize=; write"):
        make_model(Scored, CONFIG, seed=None, quantize="int8")


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
def test_a_result_has_the_cache_of_its_rows(backend, model, options):
    """Also where a compiled loop made it, padding and all; `use_cache=False` has none."""
    ids, mask = IDS.copy(), np.ones_like(IDS)
    ids[0, :2], mask[0, :2] = CONFIG.pad_token_id or 0, 0
    settings = {**SETTINGS, **options, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=mask, **settings)
    assert type(out).__name__ == ("GenerateBeamOutput" if options else "GenerateOutput")
    assert [*out] == ["sequences", *(["beam_indices"] if options else []), "past_key_values"]
    if options:
        kept = model.generate(ids, attention_mask=mask, output_scores=True, **settings)
        found = backend.to_array(out.beam_indices)
        np.testing.assert_array_equal(found, backend.to_array(kept.beam_indices))
    assert not any(isinstance(value, Later) for value in (*out.values(), *dict(out).values()))
    assert int(out.past_key_values.get_seq_length()) == 6 + NEW - 1
    rows = backend.to_array(out.sequences).astype(np.int32)
    whole = np.concatenate([mask, np.ones((2, NEW), mask.dtype)], 1)
    found = backend.call(
        model, input_ids=rows[:, -1:], attention_mask=whole, past_key_values=out.past_key_values
    ).logits
    expected = backend.run(model, input_ids=rows, attention_mask=whole).logits[:, -1:]
    np.testing.assert_allclose(backend.to_array(found), expected, rtol=0, atol=ORACLE_TOLERANCE)
    assert model.generate(ids, **settings, use_cache=False).past_key_values is None


def test_models_are_made_of_a_configuration(backend, model):
    kind = type(model)
    for make in (kind.from_config, kind._from_config):
        assert type(make(CONFIG)) is kind
        assert "float16" in str(make(CONFIG, dtype="float16").dtype)
        assert make(CONFIG, attn_implementation="eager").attn_implementation == "eager"


def test_a_legacy_cache_is_there_when_it_is_asked_for(model):
    out = model.generate(IDS, return_dict_in_generate=True, return_legacy_cache=True, **SETTINGS)
    assert len(out.past_key_values) == CONFIG.num_hidden_layers
    assert [type(layer) for layer in out.past_key_values] == [tuple]
