"""Rules: what tells programs apart, and what is a number that they are given."""

import numpy as np
import pytest

from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Request
from opt_core.generation.rules import NUMBERS, Rules, make_rules

V = 99


def rules_of(is_compiled: bool = True, prompt: int = 3, **settings) -> Rules:
    ids = np.full((1, prompt), 5, np.int32)
    request = Request(ids, None, GenerationConfig(**settings), 4, V, 90, 1)
    return Rules(*make_rules(request, is_compiled))


ALIKE = {
    "greedy": [
        {},
        {"eos_token_id": 2},
        {"eos_token_id": [2, 7, 9], "min_new_tokens": 3, "min_length": 4},
        {"suppress_tokens": [4, 5], "begin_suppress_tokens": [6], "bad_words_ids": [[8]]},
        {"sequence_bias": {(7,): -2.0}, "length_penalty": 3.0, "temperature": 0.0},
        {"forced_eos_token_id": 7},
        {"exponential_decay_length_penalty": (2, 1.1), "eos_token_id": 2},
    ],
    "looking back": [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2, "eos_token_id": 2},
        {"no_repeat_ngram_size": 4, "repetition_penalty": 1.1},
        {"bad_words_ids": [[3, 4], [5, 6, 7], [9]]},
        {"sequence_bias": {(3, 4): 1.5}},
    ],
    "sampling": [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.3, "top_k": 3, "eos_token_id": 2},
        {"do_sample": True, "top_p": 0.9, "min_p": 0.1, "suppress_tokens": [3]},
        {"do_sample": True, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    ],
    "beams": [
        {"num_beams": 3},
        {"num_beams": 3, "length_penalty": 0.0, "eos_token_id": 2},
        {"num_beams": 3, "early_stopping": True},
        {"num_beams": 3, "early_stopping": "never"},
    ],
}


@pytest.mark.parametrize("name", ALIKE)
def test_settings_that_share_a_program(name):
    first, *others = (rules_of(**settings) for settings in ALIKE[name])
    for other in others:
        assert other.structure == first.structure
        assert hash(other.structure) == hash(first.structure)
        assert other.numbers.keys() == first.numbers.keys()
        for key, value in other.numbers.items():
            assert (value.shape, value.dtype) == (first.numbers[key].shape, value.dtype)


def test_settings_that_need_programs_of_their_own():
    kinds = [
        *(settings[0] for settings in ALIKE.values()),
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "typical_p": 0.5},
        {"no_repeat_ngram_size": 5},
        {"num_beams": 4},
    ]
    made = {(r.structure, tuple(r.numbers)) for r in (rules_of(**kind) for kind in kinds)}
    assert len(made) == len(kinds)


def test_single_ids_are_biases():
    settings = {
        "eos_token_id": [2, 3], "suppress_tokens": [4], "begin_suppress_tokens": [6],
        "bad_words_ids": [[2], [8], [8, 9]], "sequence_bias": [[[7], -2.0], [[8], 1.0]],
    }  # fmt: skip
    rules = rules_of(**settings)
    banned = np.flatnonzero(np.isneginf(rules.bias)).tolist()
    assert banned == [4, 8]  # an end is never a bad word
    assert np.flatnonzero(np.isneginf(rules.begin_bias)).tolist() == [4, 6, 8]
    assert rules.bias[7] == -2
    assert np.flatnonzero(rules.ends).tolist() == [2, 3]
    kept = rules.word_bias != 0
    assert rules.words[kept].tolist() == [[-1, -1, 8, 9]]
    assert np.isneginf(rules.word_bias[kept]).all()


def test_a_forced_beginning_is_for_prompts_of_one_token():
    one, three = (rules_of(prompt=n, forced_bos_token_id=7) for n in (1, 3))
    assert np.flatnonzero(np.isfinite(one.begin_bias)).tolist() == [7]
    assert np.isfinite(three.begin_bias).all()


def test_rules_not_in_use_are_none():
    rules = rules_of(is_compiled=False)
    assert set(rules.numbers) == {"ends", "new_tokens", "pad", "vocabulary"}
    assert rules.top_p is None
    assert rules.do_sample is False
    with pytest.raises(AttributeError, match="topp"):
        _ = rules.topp
    assert set(rules_of(do_sample=True, num_beams=2).numbers) <= set(NUMBERS)


def test_negative_ends_never_end():
    assert not rules_of(eos_token_id=-1).ends.any()
