"""Beam search against the oracle's, which is held to transformers' and to brute force."""

import itertools

import numpy as np
import pytest

from tests.support import oracle, oracle_generation
from tests.support.configs import CONFIGS
from tests.support.oracle_generation import Settings
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered

pytestmark = pytest.mark.dealt

EOS = list(range(40, 56))
"""Many ends of text, so that beams really finish."""


def expected(config, prompt, settings, count, **search):
    """The oracle's best beams of one prompt: new tokens only."""
    filters = Settings(eos_token_ids=settings.pop("eos_token_id", ()), **settings)
    beams = oracle_generation.beam_search(
        oracle.random_params(config), config, prompt, settings=filters, **search
    )
    return [beam.tokens for beam in beams[:count]]


def without_padding(rows, eos, pad=1):
    """Generated tokens up to and with the first end of text, or the whole row."""
    for row in rows.tolist():
        end = next((i for i, token in enumerate(row) if token in eos), len(row) - 1)
        assert all(token == pad for token in row[end + 1 :])
        yield tuple(row[: end + 1])


@pytest.mark.parametrize(
    ("num_beams", "length_penalty", "early_stopping"),
    tiered(
        itertools.product([2, 3, 5], [0.5, 1.0, 2.0, -1.0], [True, False, "never"]),
        lambda beams, penalty, stopping: beams == 3 or (penalty, stopping) == (2.0, False),
    ),
)
def test_beams_equal_the_oracle(backend, load, num_beams, length_penalty, early_stopping):
    config, variant = CONFIGS["post_ln"], "post_ln"
    ids = make_prompts(config, 2, 6, seed=num_beams)
    search = {
        "num_beams": num_beams, "length_penalty": length_penalty,
        "early_stopping": early_stopping, "max_new_tokens": 10,
    }  # fmt: skip
    out = backend.generate(
        load(variant),
        ids,
        num_return_sequences=num_beams,
        eos_token_id=EOS,
        **search,
    )
    ours = list(without_padding(out[:, 6:], EOS))
    for row, prompt in enumerate(ids):
        theirs = expected(config, prompt, {"eos_token_id": EOS}, num_beams, **search)
        assert ours[row * num_beams : (row + 1) * num_beams] == theirs


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.4},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [8, 9]], "suppress_tokens": list(range(60, 80))},
        {"begin_suppress_tokens": list(range(3, 50)), "min_new_tokens": 4},
    ],
    ids=str,
)
def test_filters_act_on_beams(backend, load, settings):
    config = CONFIGS["pre_ln"]
    ids = make_prompts(config, 2, 6)
    search = {"num_beams": 3, "max_new_tokens": 9}
    out = backend.generate(load("pre_ln"), ids, eos_token_id=EOS, **search, **settings)
    ours = list(without_padding(out[:, 6:], EOS))
    for row, prompt in enumerate(ids):
        theirs = expected(config, prompt, {"eos_token_id": EOS, **settings}, 1, **search)
        assert [ours[row]] == theirs


FILTERS = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [52, 52]]}


@pytest.mark.parametrize(
    ("variant", "filters"),
    [
        pytest.param("pre_ln", {}, marks=(pytest.mark.xla, pytest.mark.slow)),
        pytest.param("pre_ln", FILTERS, marks=pytest.mark.xla),
        ("post_ln", FILTERS),
        pytest.param("galactica", FILTERS, marks=pytest.mark.slow),
    ],
)
def test_a_padded_batch_of_beams_is_its_rows(backend, load, variant, filters):
    lengths = [9, 4, 1]
    ids, mask = make_prompts(CONFIGS[variant], 3, 9), make_mask("left", lengths)
    model = load(variant)
    search = {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12, "eos_token_id": EOS}
    search |= filters
    together = backend.generate(model, ids, attention_mask=mask, **search)
    together = list(without_padding(together[:, 9:], EOS))
    for row, length in enumerate(lengths):
        # Three copies of it: rows of another number would be another program.
        alone = backend.generate(model, ids[[row] * 3, -length:], **search)
        alone = list(without_padding(alone[:2, length:], EOS))
        assert together[2 * row : 2 * row + 2] == alone


def test_wide_beams_find_the_best_of_all(backend, load):
    """Brute force over a tiny vocabulary; the beam is as wide as there are continuations."""
    config = CONFIGS["pre_ln"].replace(vocab_size=5)
    model = load(config)
    prompt = np.array([[2, 3, 4]])
    best = oracle_generation.exhaustive_search(
        oracle.random_params(config), config, prompt[0], max_new_tokens=3
    )[:10]
    out = backend.generate(
        model, prompt, num_beams=30, num_return_sequences=10, max_new_tokens=3, eos_token_id=None
    )
    assert [tuple(row) for row in out[:, 3:].tolist()] == [beam.tokens for beam in best]


def test_without_an_end_all_beams_are_full(backend, load):
    ids = make_prompts(CONFIGS["galactica"], 2, 4)
    model = load("galactica")
    out = backend.generate(
        model, ids, num_beams=3, num_return_sequences=3, max_new_tokens=7, eos_token_id=None
    )
    assert out.shape == (6, 11)
    assert len({tuple(row) for row in out[:3].tolist()}) == 3
    np.testing.assert_array_equal(out[:, :4], ids.repeat(3, 0))
