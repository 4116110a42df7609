"""Metrics against scikit-learn, and against SQuAD's definitions written a second time."""

import math
import re
import string
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from opt_core.errors import DataError
from opt_core.evaluation import metrics

CASES: dict[str, tuple[list[int], list[int]]] = {
    "random": tuple(np.random.default_rng(0).integers(0, 5, (2, 200)).tolist()),  # type: ignore[dict-item]
    "never predicted": ([0, 0, 1, 1], [0, 1, 2, 3]),
    "never there": ([3, 2, 1, 0], [0, 0, 0, 0]),
    "gaps": ([0, 7, 7], [7, 7, 0]),
    "one": ([2], [2]),
    "all wrong": ([1, 0, 1], [0, 1, 0]),
    "rare": ([0] * 99 + [1], [0] * 98 + [1, 1]),
}

ZERO: Any = 0
"""scikit-learn's score for a class that does not occur; its stubs expect a text."""


@pytest.mark.parametrize("name", CASES)
def test_classification_equals_scikit_learn(name: str):
    ours, truth = CASES[name]
    matrix = metrics.confusion_matrix(ours, truth)
    classes = range(len(matrix))
    assert np.array_equal(matrix, sklearn.confusion_matrix(truth, ours, labels=classes))
    assert metrics.accuracy(ours, truth) == pytest.approx(sklearn.accuracy_score(truth, ours))
    for average, value in (("macro", metrics.macro_f1), ("micro", metrics.micro_f1)):
        expected = sklearn.f1_score(truth, ours, average=average, zero_division=ZERO)
        assert value(matrix) == pytest.approx(expected)
    theirs = sklearn.precision_recall_fscore_support(
        truth, ours, labels=classes, zero_division=ZERO
    )
    for mine, expected in zip(metrics.class_scores(matrix), theirs, strict=True):
        np.testing.assert_allclose(mine, np.asarray(expected))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1))
def test_any_labels_give_what_scikit_learn_gives(pairs: list[tuple[int, int]]):
    ours, truth = (list(column) for column in zip(*pairs, strict=True))
    matrix = metrics.confusion_matrix(ours, truth, 5)
    expected = sklearn.f1_score(truth, ours, average="macro", zero_division=ZERO)
    assert metrics.macro_f1(matrix) == pytest.approx(expected)
    assert metrics.micro_f1(matrix) == pytest.approx(metrics.accuracy(ours, truth))
    assert matrix.sum() == len(pairs)


@pytest.mark.parametrize(
    ("ours", "truth", "message"),
    [
        ([], [], "received none"),
        ([0, 1], [0], "as many predictions as labels"),
        ([[0]], [[0]], "as many predictions as labels"),
        ([0, 3], [0, 1], r"predictions: expected class numbers 0\.\.2"),
        ([0, 1], [0, -1], r"labels: expected class numbers 0\.\.2"),
        ([0.5, 1], [0, 1], "predictions: expected class numbers"),
    ],
)
def test_labels_that_do_not_fit_are_refused(ours: list[int], truth: list[int], message: str):
    with pytest.raises(DataError, match=message):
        metrics.confusion_matrix(ours, truth, 3)


def test_perplexity_and_bits():
    assert metrics.perplexity(math.log(7) * 30, 30) == pytest.approx(7)
    assert metrics.perplexity(1e6, 1) == math.inf
    assert metrics.bits_per_byte(math.log(256) * 10, 10) == pytest.approx(8)


def squad_normalize(text: str) -> str:
    """Lower case, then no punctuation, then no articles, then single spaces: four steps."""
    text = text.lower()
    text = "".join(c for c in text if c not in set(string.punctuation))
    text = re.sub(r"\b(a|an|the)\b", " ", text)
    return " ".join(text.split())


def squad_scores(prediction: str, answers: list[str]) -> tuple[float, float]:
    """SQuAD 2.0's evaluation, as its paper and script define it: exact match and F1."""
    answers = [a for a in answers if squad_normalize(a)] or [""]
    exact = max(float(squad_normalize(a) == squad_normalize(prediction)) for a in answers)
    best = 0.0
    for answer in answers:
        gold, mine = squad_normalize(answer).split(), squad_normalize(prediction).split()
        same = sum((Counter(gold) & Counter(mine)).values())
        if not gold or not mine:
            f1 = float(gold == mine)
        elif not same:
            f1 = 0.0
        else:
            precision, recall = same / len(mine), same / len(gold)
            f1 = 2 * precision * recall / (precision + recall)
        best = max(best, f1)
    return exact, best


ADVERSARIAL = [
    "", " ", "the", "The The", "a.m.", "an-other", "A", "U.S.A.", "the U.S.A", "“the”", "the—end",
    "don't", "dont", "x the x", "x x", "10,000", "10000", "$5", "\uff21", "ẞ", "ß", "İ", "i̇",
    "an\nan", "the_end", "theatre", "\u00a0x\u00a0", "x\u200bx", "!?", "a a a b", "b a",
]  # fmt: skip


@pytest.mark.parametrize("prediction", ADVERSARIAL)
def test_answers_are_judged_as_squad_does(prediction: str):
    assert metrics.normalize_answer(prediction) == squad_normalize(prediction)
    rng = np.random.default_rng(0)
    several = [rng.choice(ADVERSARIAL, 3).tolist() for _ in range(10)]
    for answers in [[], *([a] for a in ADVERSARIAL), *several]:
        exact, f1 = squad_scores(prediction, answers)
        assert metrics.exact_match(prediction, answers) == exact
        assert metrics.answer_f1(prediction, answers) == pytest.approx(f1)


TEXT = st.lists(st.sampled_from(["the", "a", "x", "y", "z.", "-", "The x", "Ü", "\t"])).map(
    " ".join
)


@settings(max_examples=100, deadline=None)
@given(TEXT, st.lists(TEXT, max_size=3))
def test_any_answer_is_judged_as_squad_does(prediction: str, answers: list[str]):
    exact, f1 = squad_scores(prediction, answers)
    assert metrics.exact_match(prediction, answers) == exact
    assert metrics.answer_f1(prediction, answers) == pytest.approx(f1)


def test_known_answers():
    assert metrics.exact_match("the Denver Broncos!", ["Denver Broncos", "Broncos"]) == 1
    assert metrics.answer_f1("Denver", ["Denver Broncos"]) == pytest.approx(2 / 3)
    assert metrics.answer_f1("x x y", ["x y y"]) == pytest.approx(2 / 3)
    assert metrics.exact_match("", []) == metrics.answer_f1("", []) == 1
    assert metrics.exact_match("x", []) == metrics.answer_f1("x", []) == 0


def test_the_likeliest_is_chosen():
    assert metrics.most_likely([-3.0, -2.0, -2.0]) == 1
    assert metrics.most_likely([-3.0, -2.0], [10, 2]) == 0
    assert metrics.most_likely([-3.0, -2.0], [0, 2]) == 1
