"""Figures of merit, from predictions and truth alone."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opt_core.errors import DataError


def perplexity(nats: float, tokens: int) -> float:
    """The exponential of the mean negative log-likelihood; infinite where it overflows.

    Args:
        nats: Sum of the negative log-likelihoods.
        tokens: How many there are.
    """
    mean = nats / tokens
    return math.exp(mean) if mean < 700 else math.inf  # exp(710) is no float any more


def bits_per_byte(nats: float, size: float) -> float:
    """The cost of a text for each of its bytes: comparable between tokenizers.

    Args:
        nats: Sum of the negative log-likelihoods of all of its tokens.
        size: Bytes of the text in UTF-8.
    """
    return nats / size / math.log(2)


def accuracy(predictions: ArrayLike, labels: ArrayLike) -> float:
    """The share of predictions that equal their labels.

    Raises:
        DataError: There are none, or not as many of one as of the other.
    """
    ours, theirs = _pairs(predictions, labels)
    return float((ours == theirs).mean())


def confusion_matrix(
    predictions: ArrayLike, labels: ArrayLike, classes: int | None = None
) -> NDArray[np.int64]:
    """How often each class (row) was predicted as each class (column).

    Args:
        predictions: Class numbers [N].
        labels: Class numbers [N].
        classes: Number of classes; None: up to the largest number there is.

    Raises:
        DataError: There are none, not as many of one as of the other, or one is out of range.
    """
    ours, theirs = _pairs(predictions, labels)
    count = classes if classes is not None else int(max(ours.max(), theirs.max())) + 1
    for name, values in (("predictions", ours), ("labels", theirs)):
        if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= count:
            raise DataError(f"{name}: expected class numbers 0..{count - 1}")
    return np.bincount(theirs * count + ours, minlength=count * count).reshape(count, count)


class ClassScores(NamedTuple):
    """How well each class was found.

    Attributes:
        precision: Share of the predictions of a class that are right; 0 where there are none.
        recall: Share of a class that was found; 0 where there is none of it.
        f1: Their harmonic mean; 0 where both are.
        support: How many there are of each class.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    support: NDArray[np.int64]


def class_scores(matrix: NDArray[np.int64]) -> ClassScores:
    """Precision, recall and F1 of each class of a confusion matrix."""
    right = matrix.diagonal().astype(np.float64)
    support, predicted = matrix.sum(1), matrix.sum(0)
    return ClassScores(
        right / np.maximum(predicted, 1),
        right / np.maximum(support, 1),
        2 * right / np.maximum(predicted + support, 1),
        support,
    )


def macro_f1(matrix: NDArray[np.int64]) -> float:
    """The mean F1 of the classes of a confusion matrix that occur in labels or predictions."""
    occurs = (matrix.sum(0) + matrix.sum(1)) > 0
    return float(class_scores(matrix).f1[occurs].mean())


def micro_f1(matrix: NDArray[np.int64]) -> float:
    """F1 over all decisions together; with one label each, that is the accuracy."""
    return float(matrix.diagonal().sum() / matrix.sum())


_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """An answer as SQuAD compares it: lower case, no ASCII punctuation, no articles, single spaces.

    The order matters (Rajpurkar et al. 2016, the official evaluation script): "a.m." has lost its
    points before articles are looked for, so that it keeps its "a".
    """
    text = text.lower().translate(_NO_PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1 if a prediction equals one of the answers once both are normalised, otherwise 0.

    Args:
        prediction: Text; empty for "no answer".
        answers: Accepted texts; none, or empty ones, where the question has no answer.
    """
    wanted = [normalize_answer(answer) for answer in _accepted(answers)]
    return float(normalize_answer(prediction) in wanted)


def answer_f1(prediction: str, answers: Sequence[str]) -> float:
    """The best F1 of the words a prediction shares with an answer, as SQuAD defines it.

    Where either has no words, it is 1 if neither has and 0 otherwise.

    Args:
        prediction: As in `exact_match`.
        answers: As in `exact_match`.
    """
    ours = normalize_answer(prediction).split()
    return max(_word_f1(ours, normalize_answer(a).split()) for a in _accepted(answers))


def _word_f1(ours: list[str], theirs: list[str]) -> float:
    if not ours or not theirs:
        return float(ours == theirs)
    shared = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def _accepted(answers: Sequence[str]) -> list[str]:
    """The answers that count: those with words in them, or "no answer"."""
    return [answer for answer in answers if normalize_answer(answer)] or [""]


def most_likely(scores: ArrayLike, lengths: ArrayLike | None = None) -> int:
    """Which of several continuations is likeliest; the first, where some are equally likely.

    Args:
        scores: The log-likelihood of each.
        lengths: What to divide them by: the characters of each (`acc_norm`); None: nothing (`acc`).
    """
    values = np.asarray(scores, np.float64)
    return int((values if lengths is None else values / np.maximum(lengths, 1)).argmax())


def _pairs(predictions: ArrayLike, labels: ArrayLike) -> tuple[NDArray[Any], NDArray[Any]]:
    ours, theirs = np.asarray(predictions), np.asarray(labels)
    if ours.shape != theirs.shape or ours.ndim != 1:
        raise DataError(
            f"expected as many predictions as labels, received {ours.shape} and {theirs.shape}"
        )
    if not ours.size:
        raise DataError("expected predictions to judge, received none")
    return ours, theirs
