"""Perplexity and likelihoods of continuations, from a model whose every score is known."""

import math
from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.errors import DataError
from opt_core.evaluation.perplexity import ContinuationScore, score_continuations, text_perplexity
from tests.support.small_tokenizer import TEXT as TEXTS
from tests.support.small_tokenizer import write_opt_folder

TEXT = " ".join(TEXTS)
TABLE = np.random.default_rng(0).normal(size=(400, 400))
TABLE -= np.log(np.exp(TABLE).sum(1, keepdims=True))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


class Bigrams:
    """A model of pairs of tokens; it remembers the shapes it was asked for."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, ids: Any) -> tuple[Any, Any]:
        assert ids.dtype == np.int32
        self.shapes.append(ids.shape)
        rows = TABLE[ids[:, :-1]]
        picked = np.take_along_axis(rows, ids[:, 1:, None], -1)[..., 0]
        return picked.astype(np.float32), picked == rows.max(-1)


def log_likelihood(ids: Any, first: int) -> float:
    return sum(float(TABLE[a, b]) for a, b in zip(ids[first - 1 :], ids[first:], strict=False))


@pytest.mark.parametrize("batch_size", [1, 2, 7])
def test_perplexity_by_the_protocol(tokenizer: OPTTokenizer, batch_size: int):
    ids, window = tokenizer.encode(TEXT), 16
    count = len(ids) // window
    assert len(ids) % window
    model = Bigrams()
    result = text_perplexity(model, TEXT, tokenizer, window, batch_size=batch_size)
    means = [
        -log_likelihood(ids[i * window : (i + 1) * window], 1) / (window - 1) for i in range(count)
    ]
    # exp(sum over windows of the mean loss * window / (windows * window)), as the GPTQ code has it
    assert result.perplexity == pytest.approx(
        math.exp(sum(m * window for m in means) / (count * window))
    )
    assert (result.windows, result.tokens) == (count, count * (window - 1))
    assert set(model.shapes) == {(min(batch_size, count), window)}
    per_byte = np.mean(means) * (len(ids) - 1) / len(TEXT.encode()) / math.log(2)
    assert result.bits_per_byte == pytest.approx(per_byte)
    limited = text_perplexity(Bigrams(), TEXT, tokenizer, window, limit=2)
    assert limited.nats_per_token == pytest.approx(np.mean(means[:2]))


@pytest.mark.parametrize(("window", "stride"), [(16, 4), (16, 15), (10, 3), (4000, 100), (17, 1)])
def test_with_a_stride_every_token_is_predicted_once(
    tokenizer: OPTTokenizer, window: int, stride: int
):
    ids = tokenizer.encode(TEXT)
    told: list[tuple[int, int]] = []
    result = text_perplexity(
        Bigrams(), TEXT, tokenizer, window, stride, 3, progress=lambda *done: told.append(done)
    )
    nats = -log_likelihood(ids, 1)
    assert result.tokens == len(ids) - 1
    assert result.nats_per_token == pytest.approx(nats / (len(ids) - 1))
    assert result.bits_per_byte == pytest.approx(nats / len(TEXT.encode()) / math.log(2))
    assert told[-1] == (result.windows, result.windows)


def test_with_a_stride_enough_comes_before(tokenizer: OPTTokenizer):
    def context(ids: Any) -> tuple[Any, Any]:  # "log-likelihood": minus the tokens before
        scores = np.tile(-np.arange(1.0, ids.shape[1]), (len(ids), 1))
        return scores.astype(np.float32), scores > 0

    count = len(tokenizer.encode(TEXT))
    result = text_perplexity(context, TEXT, tokenizer, 16, 4, 3)
    before = sum(min(i, 12 + (i - 16) % 4) if i >= 16 else i for i in range(1, count))
    assert result.nats_per_token * result.tokens == pytest.approx(before)


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("dog", {"window": 64}, r"has \d tokens, less than one window of 64"),
        ("", {"window": 4, "stride": 1}, "the text is empty"),
        ("dog", {"window": 1}, "window: expected at least 2 tokens, received 1"),
        ("dog", {"window": 4, "stride": 4}, r"stride: expected 1\.\.3, received 4"),
        ("dog " * 9, {"window": 4, "batch_size": 0}, "batch_size: expected at least 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(
    tokenizer: OPTTokenizer, text: str, arguments: Any, message: str
):
    with pytest.raises(DataError, match=message):
        text_perplexity(Bigrams(), text, tokenizer, **arguments)


PAIRS = [
    ("The quick brown", " fox"),
    ("The quick brown ", "fox"),
    ("", "I like you."),
    ("Hello", " world, my dog is a little older than yours."),
    ("The quick brown fox jumps over the lazy", " dog"),
]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_continuations(tokenizer: OPTTokenizer, batch_size: int):
    model = Bigrams()
    told: list[tuple[int, int]] = []
    found = score_continuations(
        model, tokenizer, PAIRS, 512, batch_size, lambda *done: told.append(done)
    )
    for (context, text), score in zip(PAIRS, found, strict=True):
        ids = tokenizer.encode(context + text)
        first = len(tokenizer.encode(context.rstrip()))
        assert score.tokens == len(ids) - first
        assert score.log_likelihood == pytest.approx(log_likelihood(ids, first), rel=1e-5)
        assert not score.is_greedy
    assert found[0] == found[1]
    assert told[-1] == (5, 5)
    assert {rows for rows, _ in model.shapes} == {min(batch_size, 5)}
    assert all(width % 8 == 0 for _, width in model.shapes)


def test_a_greedy_continuation_is_known(tokenizer: OPTTokenizer):
    def always(ids: Any) -> tuple[Any, Any]:
        scores, _ = Bigrams()(ids)
        return scores, np.arange(1, ids.shape[1]) >= 3 + np.zeros((len(ids), 1))

    pairs = [("", "x"), ("dog dog dog", " dog"), ("", "dog dog")]
    assert [s.is_greedy for s in score_continuations(always, tokenizer, pairs, 64)] == [
        False, True, False,
    ]  # fmt: skip


def test_of_a_long_context_the_end_counts(tokenizer: OPTTokenizer):
    context = "the dog likes you " * 50
    (score,) = score_continuations(Bigrams(), tokenizer, [(context, "and me")], 24)
    ids = tokenizer.encode(context + "and me")[-24:]
    assert isinstance(score, ContinuationScore)
    assert score.log_likelihood == pytest.approx(log_likelihood(ids, 24 - score.tokens), rel=1e-5)
    with pytest.raises(DataError, match=r"\d+ tokens do not fit into a window of 24"):
        score_continuations(Bigrams(), tokenizer, [("", context)], 24)
    with pytest.raises(DataError, match="expected a text with tokens of its own"):
        score_continuations(Bigrams(), tokenizer, [("dog", "")], 24)
