"""Cleaning of documents, and duplicates among them."""

from typing import Any

import numpy as np
import pytest

from opt_core.data.cleaning import Cleaning, clean, length_problem
from opt_core.data.deduplication import SHINGLE_WORDS, DuplicateFilter, fingerprints
from opt_core.errors import DataError


@pytest.mark.parametrize(
    ("text", "cleaned", "removed"),
    [
        ("a\r\nb\rc\n\n", "a\nb\nc", 0),
        ("\ufeffa\x00b\x1b[0m\x7f\x85", "ab[0m", 5),
        ("half \ud800 pair\ufffe", "half  pair", 2),
        ("e\u0301 \ufb01", "\u00e9 \ufb01", 0),
        ("\tcode:\n\tindented  \n", "\tcode:\n\tindented", 0),
        ("\n \n  first\nsecond", "  first\nsecond", 0),
        ("\U0001f469\u200d\U0001f52c", "\U0001f469\u200d\U0001f52c", 0),
        (" \n\t", "", 0),
        ("", "", 0),
    ],
)
def test_clean(text: str, cleaned: str, removed: int):
    assert clean(text, Cleaning()) == (cleaned, removed)
    cleaned.encode()  # no half of a surrogate pair is left


def test_normalisation_is_chosen():
    assert clean("e\u0301\ufb01", Cleaning(normalization="NFKC"))[0] == "\u00e9fi"
    assert clean("e\u0301\ufb01", Cleaning(normalization=None))[0] == "e\u0301\ufb01"


def test_length_decides():
    rules = Cleaning(min_chars=3, max_chars=5)
    texts = ["", "  ab", "abc", "  abcde", "abcdef"]
    expected = ["empty", "too short", None, None, "too long"]
    assert [length_problem(text, rules) for text in texts] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalization": "NFX"}, "expected NFC, NFKC or none, received 'NFX'"),
        ({"min_chars": 0}, "min_chars: expected at least 1"),
        ({"min_chars": 5, "max_chars": 4}, "expected at least min_chars=5, received 4"),
        ({"max_repetition": 1.5}, r"max_repetition: expected 0\.\.1"),
        ({"near_duplicates": 0.4}, r"near_duplicates: expected 0\.5\.\.1"),
    ],
)
def test_rules_out_of_range_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(DataError, match=message):
        Cleaning(**change)


def words(rng: np.random.Generator, count: int) -> list[str]:
    return [f"w{i}ß" for i in rng.integers(0, 10_000, count)]


def sequences(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(text[i : i + SHINGLE_WORDS]) for i in range(len(text) - SHINGLE_WORDS + 1)}


def test_repetition_is_the_share_of_sequences_that_came_before():
    rng = np.random.default_rng(0)
    texts = [words(rng, 300), words(rng, 50) * 6, ["Spam"] * 100, words(rng, 4), []]
    texts += [["a", "b", "c", "d", "e", "f"] * 2]
    found = fingerprints([" ".join(text) for text in texts])
    for text, share in zip(texts, found.repetition, strict=True):
        count = len(text) - SHINGLE_WORDS + 1
        expected = (count - len(sequences(text))) / count if count > 0 else 0
        assert share == pytest.approx(expected)


def test_signatures_estimate_similarity():
    rng = np.random.default_rng(1)
    for changed in (0, 3, 10, 40):
        one = words(rng, 400)
        other = list(one)
        for i in rng.choice(400, changed, replace=False):
            other[i] = "new"
        a, b = sequences(one), sequences(other)
        similarity = len(a & b) / len(a | b)
        pair = fingerprints([" ".join(one), " ".join(other)]).signatures
        assert (pair[0] == pair[1]).mean() == pytest.approx(similarity, abs=0.12)


def test_fingerprints_do_not_depend_on_what_is_computed_together():
    rng = np.random.default_rng(2)
    texts = [" ".join(words(rng, n)) for n in (30, 3, 0, 200)]
    together = fingerprints(texts)
    for i, text in enumerate(texts):
        alone = fingerprints([text])
        assert alone.digests[0] == together.digests[i]
        assert np.array_equal(alone.signatures[0], together.signatures[i])
        assert np.array_equal(alone.bands[0], together.bands[i])


def problems(texts: list[str], near: float) -> list[str | None]:
    seen, found = DuplicateFilter(near), fingerprints(texts)
    return [seen.problem(found, i) for i in range(len(texts))]


def test_duplicates_are_found():
    rng = np.random.default_rng(3)
    text = words(rng, 500)
    other = [*text[:250], "changed", *text[251:]]
    texts = [" ".join(text), " ".join(words(rng, 500)), " ".join(other), " ".join(text)]
    texts += [
        " ".join(text).replace("w", "W").replace(" ", ", "),
        "short one",
        "short two",
        "short one",
    ]
    near, same = "near-duplicate", "duplicate"
    assert problems(texts, 0.8) == [None, None, near, same, near, None, None, same]
    assert problems(texts, 1.0) == [None, None, None, same, None, None, None, same]
    half = " ".join([*text[:250], *words(rng, 250)])
    assert problems([texts[0], half], 0.8) == [None, None]


def test_nothing_is_found_among_nothing():
    assert problems(["", "a"], 0.8) == [None, None]
