"""Evaluation of language models: perplexity, and how likely continuations are.

Nothing here knows a framework. What a model says comes from a function that a backend provides:
`opt_torch.scoring.token_scores` and its siblings, their first argument bound to a model.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import DataError
from opt_core.evaluation.metrics import bits_per_byte, perplexity
from opt_core.text.adapter import as_tokenizer
from opt_core.text.tokenizer import OPTTokenizer

TokenScores = Callable[[NDArray[np.int32]], tuple[NDArray[np.float32], NDArray[np.bool_]]]
"""Ids [B, T] -> log-likelihood of each next token, and whether none was likelier, [B, T - 1]."""
Progress = Callable[[int, int], None]
"""Called with (rows done, rows in all)."""

_PAD_TO_MULTIPLE_OF = 8  # padded lengths, so that not every batch has a shape of its own


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        perplexity: Exponential of the mean negative log-likelihood of a token.
        nats_per_token: That mean.
        bits_per_byte: The same per byte of the text, so that tokenizers can be compared.
        tokens: Tokens that were predicted.
        windows: Rows that the text was cut into.
        window: Tokens of a row.
    """

    perplexity: float
    nats_per_token: float
    bits_per_byte: float
    tokens: int
    windows: int
    window: int


def text_perplexity(
    token_scores: TokenScores,
    text: str,
    tokenizer: OPTTokenizer,
    window: int,
    stride: int | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of a text.

    Without a stride, by the protocol of the GPTQ paper (arXiv 2210.17323), in which OPT's published
    figures are: the text is tokenised as a whole, cut into windows that do not overlap, what is
    left at the end is dropped, and the first token of each window is given. With a stride, windows
    overlap, and every token but the first is predicted once, from at least `window - stride` tokens
    before it; a text shorter than a window will do.

    Args:
        token_scores: The model's.
        text: The text.
        tokenizer: The model's.
        window: Tokens of a row: the model's `max_position_embeddings`, for published figures.
        stride: How far one window is from the next; None: no overlap.
        batch_size: Windows at a time.
        limit: Windows at most; None: all.
        progress: Called after each batch.

    Raises:
        DataError: The text is shorter than one window, or numbers that do not fit.
    """
    if window < 2:
        raise DataError(f"window: expected at least 2 tokens, received {window}")
    if stride is not None and not 1 <= stride < window:
        raise DataError(f"stride: expected 1..{window - 1}, received {stride}")
    ids = np.array(as_tokenizer(tokenizer).encode(text), np.int32)
    count = len(ids)
    if stride is None and count < window:
        raise DataError(
            f"the text has {count} tokens, less than one window of {window}; name a smaller "
            "window, or a stride"
        )
    if count < 2:
        raise DataError("the text is empty: expected at least one token to predict")
    starts = range(0, count - window + 1, window)
    if stride is not None:
        starts = range(0, max(1, count - window + stride), stride)
    starts = list(starts)[:limit]
    batch_size = min(batch_size, len(starts))
    nats, predicted, done, finished = 0.0, 0, 1, 0  # the very first token is given
    for batch in _batches(starts, batch_size):
        rows = [ids[start : start + window] for start in batch]
        scores, _ = _padded_scores(token_scores, rows, batch_size, window)
        for start, row, values in zip(batch, rows, scores, strict=True):
            first = max(done - start, 1) if stride is not None else 1
            nats -= float(values[first - 1 : len(row) - 1].sum(dtype=np.float64))
            predicted += len(row) - first
            done = start + len(row)
        finished += len(batch)
        if progress:
            progress(finished, len(starts))
    size = len(text.encode()) * predicted / (count - 1)
    return PerplexityResult(
        perplexity(nats, predicted),
        nats / predicted,
        bits_per_byte(nats, size),
        predicted,
        len(starts),
        window,
    )


class ContinuationScore(NamedTuple):
    """How a model judges a text that follows another one.

    Attributes:
        log_likelihood: Of all its tokens, in nats.
        is_greedy: Whether each of its tokens is the likeliest there.
        tokens: How many it has.
    """

    log_likelihood: float
    is_greedy: bool
    tokens: int


def score_continuations(
    token_scores: TokenScores,
    tokenizer: OPTTokenizer,
    pairs: Sequence[tuple[str, str]],
    window: int,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> list[ContinuationScore]:
    """Judges texts, each as what follows a context.

    Context and text are tokenised together and cut where the context's own tokens end, spaces at
    its end counted to the text, as EleutherAI's harness does. A row begins with the
    beginning-of-text token; of one that is too long, the beginning is cut off.

    Args:
        token_scores: The model's.
        tokenizer: The model's.
        pairs: (context, text); the context may be empty.
        window: Most tokens of a row: the model's `max_position_embeddings`.
        batch_size: Rows at a time.
        progress: Called after each batch.

    Raises:
        DataError: A text has no tokens, or more than fit.
    """
    tokenizer = as_tokenizer(tokenizer)
    rows: list[NDArray[np.int32]] = []
    counts: list[int] = []
    for context, text in pairs:
        ids, count = _encode_pair(tokenizer, context, text)
        if count >= window:
            raise DataError(f"{text[:40]!r}: {count} tokens do not fit into a window of {window}")
        rows.append(np.array(ids[-window:], np.int32))
        counts.append(count)
    found: dict[int, ContinuationScore] = {}
    batch_size = min(batch_size, len(rows))
    # Rows of like length together: little padding, and the largest batch comes first.
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for batch in _batches(order, batch_size):
        longest = max(len(rows[i]) for i in batch)
        width = min(longest + -longest % _PAD_TO_MULTIPLE_OF, window)
        scores, likeliest = _padded_scores(
            token_scores, [rows[i] for i in batch], batch_size, width
        )
        for i, values, best in zip(batch, scores, likeliest, strict=True):
            part = slice(len(rows[i]) - 1 - counts[i], len(rows[i]) - 1)
            total = float(values[part].sum(dtype=np.float64))
            found[i] = ContinuationScore(total, bool(best[part].all()), counts[i])
        if progress:
            progress(len(found), len(rows))
    return [found[i] for i in range(len(rows))]


def score_text(
    token_scores: TokenScores,
    tokenizer: OPTTokenizer,
    text: str,
    window: int,
    batch_size: int = 8,
) -> float:
    """The log-likelihood of a text as a whole, after a beginning-of-text token, in nats.

    Every token is predicted once, in rows that overlap in one token alone; the last row reaches
    back as far as it can, as EleutherAI's harness does it.

    Args:
        token_scores: The model's.
        tokenizer: The model's.
        text: The text; an empty one has a likelihood of 1.
        window: Most tokens of a row: the model's `max_position_embeddings`.
        batch_size: Rows at a time.
    """
    tokenizer = as_tokenizer(tokenizer)
    ids = np.array(
        [_bos_id(tokenizer), *tokenizer.encode(text, add_special_tokens=False)], np.int32
    )
    firsts = list(range(1, len(ids), window - 1))  # the first token that a row predicts
    width = min(len(ids) + -len(ids) % _PAD_TO_MULTIPLE_OF, window)
    batch_size = min(batch_size, max(1, len(firsts)))
    total = 0.0
    for batch in _batches(firsts, batch_size):
        ends = [min(first + window - 1, len(ids)) for first in batch]
        starts = [max(0, end - window) for end in ends]
        rows = [ids[start:end] for start, end in zip(starts, ends, strict=True)]
        scores, _ = _padded_scores(token_scores, rows, batch_size, width)
        for first, start, end, values in zip(batch, starts, ends, scores, strict=True):
            total += float(values[first - start - 1 : end - start - 1].sum(dtype=np.float64))
    return total


def padded_batches(
    examples: Sequence[dict[str, Any]], batch_size: int
) -> Iterator[tuple[range, NDArray[np.int32]]]:
    """The "input_ids" of padded examples: which ones, and their rows, as many in every batch."""
    batch_size = min(batch_size, len(examples))
    for indices in _batches(range(len(examples)), batch_size):
        rows = [examples[i]["input_ids"] for i in indices]
        rows += [rows[-1]] * (batch_size - len(rows))
        yield range(indices[0], indices[-1] + 1), np.stack(rows)


def _encode_pair(tokenizer: OPTTokenizer, context: str, text: str) -> tuple[list[int], int]:
    """The ids of both, a beginning before them, and how many are the text's."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, text = context[:-spaces], context[-spaces:] + text
    both: list[int] = tokenizer.encode(context + text, add_special_tokens=False)
    before: list[int] = tokenizer.encode(context, add_special_tokens=False) if context else []
    count = len(both) - len(before)
    if count < 1:
        raise DataError(f"{text!r}: expected a text with tokens of its own after its context")
    return [_bos_id(tokenizer), *both], count


def _bos_id(tokenizer: OPTTokenizer) -> int:
    begin = tokenizer.bos_token_id if tokenizer.add_bos else tokenizer.eos_token_id
    if begin is None:
        raise DataError("the tokenizer names no token to begin a text with (bos or eos)")
    return begin


def _batches(items: Sequence[int], size: int) -> Iterator[list[int]]:
    if size < 1:
        raise DataError(f"batch_size: expected at least 1, received {size}")
    for start in range(0, len(items), size):
        yield list(items[start : start + size])


def _padded_scores(
    token_scores: TokenScores, rows: list[NDArray[np.int32]], batch_size: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """The scores of some rows, filled up so that all batches of a width share a program."""
    ids = np.ones((batch_size, width), np.int32)  # any id: nothing looks at what comes later
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    scores, likeliest = token_scores(ids)
    return scores[: len(rows)], likeliest[: len(rows)]
