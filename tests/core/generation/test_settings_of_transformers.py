"""Settings of generation, used as code written for `transformers` uses them."""

import json

import pytest

from opt_core import GenerationConfig, OPTConfig
from opt_core.errors import ConfigError, GenerationError


class Theirs:
    """As `transformers`' own object is."""

    def to_diff_dict(self):
        return {"max_new_tokens": 5, "_from_model_config": True, "transformers_version": "5.24.0"}


def test_several_values_equal_lists():
    settings = GenerationConfig(bad_words_ids=[[1, 2], [3]], eos_token_id=[1, 2])
    assert settings.bad_words_ids == [[1, 2], [3]] == list(settings.bad_words_ids or ())
    assert settings.eos_token_id == [1, 2]
    assert settings.eos_token_id != [1, 3]
    assert settings == GenerationConfig(bad_words_ids=((1, 2), (3,)), eos_token_id=(1, 2))
    assert hash(settings) == hash(GenerationConfig(**settings.to_diff_dict()))
    assert GenerationConfig(sequence_bias={(4, 5): -0.5}).sequence_bias == [[[4, 5], -0.5]]


def test_names_without_effect_are_kept_and_refused_ones_are_refused_at_use(tmp_path):
    settings = GenerationConfig(num_assistant_tokens_schedule="heuristic", is_assistant=True)
    settings.cache_implementation = "static"
    assert settings.num_assistant_tokens_schedule == "heuristic"
    assert GenerationConfig().assistant_confidence_threshold == 0.4
    settings.watermarking_config = {"bias": 2.5}
    settings.save_pretrained(tmp_path)
    read = GenerationConfig.from_pretrained(tmp_path)
    assert (read.is_assistant, read.cache_implementation) == (True, "static")
    assert read.watermarking_config == {"bias": 2.5}
    check = {"config": OPTConfig(), "prompt_length": 3, "longest": 3, "has_tokenizer": True}
    with pytest.raises(GenerationError, match="watermarking_config is not supported"):
        read.check(**check)
    read.watermarking_config = None
    read.check(**check)
    with pytest.raises(GenerationError, match="cache_implementation: expected one of dynamic"):
        settings.cache_implementation = "fast"
    with pytest.raises(GenerationError, match="logits_processor is no setting"):
        GenerationConfig(logits_processor=[])


def test_unknown_names_are_kept_with_a_warning_and_slips_refused(tmp_path):
    with pytest.warns(UserWarning, match="foo: no setting of generation"):
        settings = GenerationConfig(foo="bar")
    assert settings.foo == "bar"
    settings.to_json_file(tmp_path / "mine.json")
    assert json.loads((tmp_path / "mine.json").read_text())["foo"] == "bar"
    with pytest.raises(GenerationError, match="did you mean 'max_new_tokens'"):
        GenerationConfig(max_new_token=3)
    with pytest.raises(AttributeError, match="no setting 'nothing'"):
        _ = settings.nothing
    assert settings.update(top_k=3, other=1) == {"other": 1}
    assert settings.update(defaults_only=True, top_k=5, top_p=0.5) == {}
    assert (settings.top_k, settings.top_p) == (3, 0.5)


def test_files_by_other_names_and_overrides(tmp_path):
    GenerationConfig(do_sample=True, temperature=0.7).save_pretrained(
        save_directory=tmp_path, config_file_name="mine.json"
    )
    read, unused = GenerationConfig.from_pretrained(
        pretrained_model_name=tmp_path, config_file_name="mine.json", temperature=1.0, foo=False,
        return_unused_kwargs=True,
    )  # fmt: skip
    assert (read.do_sample, read.temperature, unused) == (True, 1.0, {"foo": False})
    with pytest.raises(ConfigError, match="unknown argument 'foo'"):
        GenerationConfig.from_pretrained(tmp_path, config_file_name="mine.json", foo=1)
    bad = GenerationConfig()
    bad.num_return_sequences = 2
    with pytest.raises(GenerationError, match="num_return_sequences > 1 needs"):
        bad.save_pretrained(tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_an_old_configuration_says_how_to_generate():
    config = OPTConfig(
        max_length=12, do_sample=True, num_beams=2, output_attentions=True, prefix="</s>"
    )
    settings = GenerationConfig.from_model_config(config)
    assert (settings.max_length, settings.do_sample, settings.num_beams) == (12, True, 2)
    assert (settings.eos_token_id, settings.output_attentions) == (2, False)
    refused = GenerationConfig.from_model_config(OPTConfig(encoder_no_repeat_ngram_size=3))
    assert "encoder_no_repeat_ngram_size is not supported" in refused.refused[0][1]


def test_others_objects_are_taken():
    assert GenerationConfig.from_any(Theirs()) == GenerationConfig(max_new_tokens=5)
    assert GenerationConfig.from_any({"top_k": 4}).top_k == 4
    with pytest.raises(GenerationError, match="expected a GenerationConfig, received int"):
        GenerationConfig.from_any(3)


@pytest.mark.parametrize(
    ("values", "mode"),
    [
        ({}, "greedy_search"),
        ({"do_sample": True}, "sample"),
        ({"num_beams": 2}, "beam_search"),
        ({"num_beams": 2, "do_sample": True}, "beam_sample"),
        ({"num_beams": 2, "num_beam_groups": 2}, "group_beam_search"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted_generation"),
    ],
    ids=str,
)
def test_modes_have_transformers_names(values, mode):
    assert GenerationConfig(**values).get_generation_mode() == mode


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.5}, "temperature=0.5 has no effect with do_sample=False"),
        ({"top_k": 7}, "top_k=7 has no effect with do_sample=False; change do_sample, or leave"),
        ({"early_stopping": True}, "early_stopping=True has no effect with num_beams=1"),
    ],
)
def test_settings_without_effect_are_not_saved(settings, message, tmp_path):
    given = GenerationConfig(**settings)
    given.validate()
    for refuse in (lambda: given.validate(strict=True), lambda: given.save_pretrained(tmp_path)):
        with pytest.raises(GenerationError, match=message):
            refuse()
    assert not list(tmp_path.iterdir())
    heeded = {"do_sample": True, "num_beams": 2, **settings}
    GenerationConfig(**heeded).save_pretrained(tmp_path)
    GenerationConfig(penalty_alpha=0.6, top_k=4).validate(strict=True)
