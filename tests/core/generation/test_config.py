"""Generation settings: transformers' defaults and files, and refusals that name the setting."""

import json
from typing import Any

import numpy as np
import pytest

from opt_core.compatibility.config_keys import SPELLED_AS
from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig


def write(folder, **values):
    (folder / "generation_config.json").write_text(json.dumps(values))
    return folder


def test_the_hubs_file(tmp_path):
    write(
        tmp_path, _from_model_config=True, bos_token_id=2, eos_token_id=2, pad_token_id=1,
        transformers_version="4.27.0.dev0",
    )  # fmt: skip
    config = GenerationConfig.from_pretrained(tmp_path)
    assert config == GenerationConfig.from_model(OPTConfig())
    assert config.eos_ids == (2,)


def test_round_trip(tmp_path):
    lists: dict[str, Any] = {"eos_token_id": [2, 5], "bad_words_ids": [[3], [4, 5]]}
    config = GenerationConfig(
        do_sample=True, temperature=0.7, stop_strings="\n", max_new_tokens=9,
        early_stopping="never", num_beams=2, **lists,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert config.eos_ids == (2, 5)
    assert config.stops == ("\n",)
    assert config.bad_words_ids == ((3,), (4, 5))
    assert hash(config) == hash(config.replace())


def test_features_that_are_switched_off_are_accepted(tmp_path):
    write(
        tmp_path,
        num_beam_groups=1,
        diversity_penalty=0.0,
        use_cache=True,
        top_k=None,
        penalty_alpha=None,
    )
    assert GenerationConfig.from_pretrained(tmp_path) == GenerationConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beam_groups": 2}, "num_beam_groups=2 does not divide num_beams=1"),
        ({"dola_layers": "low"}, "dola_layers is not supported"),
        ({"temperatre": 0.6}, "unknown generation option 'temperatre'; did you mean 'temperature'"),
        ({"max_new_token": 1}, "unknown generation option 'max_new_token'; did you mean"),
        ({"temperature": -1}, "temperature"),
        ({"do_sample": "yes"}, "do_sample: expected True or False"),
        ({"eos_token_id": []}, None),
    ],
    ids=str,
)
def test_files_that_ask_for_more_are_refused_at_use(tmp_path, values, message):
    """They stop no weights from loading; `generate` says what cannot be honoured."""
    write(tmp_path, bos_token_id=2, **values)
    settings = GenerationConfig.from_pretrained(tmp_path)
    assert settings.bos_token_id == 2
    check = {"config": OPTConfig(), "prompt_length": 3, "longest": 3, "has_tokenizer": True}
    if message is None:
        settings.replace(max_new_tokens=2).check(**check)
        return
    with pytest.raises(GenerationError, match=message) as error:
        settings.check(**check)
    assert "generation_config.json" in str(error.value)
    assert "=None to go without" in str(error.value) or "GenerationConfig(" in str(error.value)
    settings.replace(**dict.fromkeys(values)) if settings.refused[0][0] else GenerationConfig()


def test_what_a_file_asks_for_can_be_waived(tmp_path):
    write(tmp_path, dola_layers="high", temperature=0.5)
    settings = GenerationConfig.from_pretrained(tmp_path).replace(dola_layers=None, max_length=9)
    settings.check(OPTConfig(), 3, 3, False)
    assert settings.temperature == 0.5


def test_fields_can_be_set_and_are_checked_when_used():
    settings = GenerationConfig(max_new_tokens=2)
    settings.eos_token_id = [2, 5]  # type: ignore[assignment]
    settings.top_k = None
    assert (settings.eos_ids, settings.top_k) == ((2, 5), None)
    settings.top_p = 7.0
    with pytest.raises(GenerationError, match="top_p: expected a number"):
        settings.check(OPTConfig(), 3, 3, False)
    with pytest.raises(GenerationError, match="unknown generation option 'topp'"):
        settings.topp = 1.0  # type: ignore[attr-defined]


def test_settings_as_dictionaries():
    settings = GenerationConfig(top_k=5, bad_words_ids=((3,),))
    version = {"transformers_version": SPELLED_AS}
    assert settings.to_diff_dict() == {"top_k": 5, "bad_words_ids": ((3,),), **version}
    assert GenerationConfig.from_dict(settings.to_dict()) == settings
    assert json.loads(settings.to_json_string()) == {"top_k": 5, "bad_words_ids": [[3]], **version}
    assert SPELLED_AS not in settings.to_json_string(ignore_metadata=True)
    assert settings.update(top_k=7, other=1) == {"other": 1}
    assert settings.top_k == 7


def test_lengths():
    config = GenerationConfig(max_length=20)
    assert config.new_tokens(5) == 15
    assert config.replace(max_new_tokens=3).new_tokens(50) == 3
    assert config.replace(max_new_tokens=3).replace(max_length=30).new_tokens(5) == 25
    with pytest.raises(GenerationError, match="leaves no room after a prompt of 20 tokens"):
        config.new_tokens(20)


def test_the_window():
    config, settings = OPTConfig(max_position_embeddings=10), GenerationConfig(max_new_tokens=4)
    settings.check(config, prompt_length=30, longest=7, has_tokenizer=False)
    with pytest.raises(GenerationError, match="8 tokens and 4 new ones do not fit"):
        settings.check(config, prompt_length=8, longest=8, has_tokenizer=False)


def test_none_means_not_set(tmp_path):
    """As in transformers, except for the settings that have a meaning for it."""
    unset = GenerationConfig(num_beams=None, temperature=None, max_length=None, top_p=None)  # type: ignore[arg-type]
    assert unset == GenerationConfig()
    free = GenerationConfig(top_k=None)
    assert free.top_k is None
    free.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).top_k == 0


def test_numbers_of_numpy():
    values = {"max_new_tokens": np.int64(4), "eos_token_id": np.array([2, 5])}
    numpy = GenerationConfig().replace(**values, temperature=np.float32(0.5))
    assert numpy == GenerationConfig(max_new_tokens=4, eos_token_id=(2, 5), temperature=0.5)


@pytest.mark.parametrize(
    "values", [{"length_penalty": 1000.0}, {"temperature": float("inf")}, {"early_stopping": 1}]
)
def test_values_without_a_meaning(values):
    with pytest.raises(GenerationError, match=next(iter(values))):
        GenerationConfig(**values)
