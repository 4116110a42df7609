"""Choosing the next token: filters of logits and draws, all pure functions.

The order of the filters and their meanings are those of `transformers`. What a row has so far is
given as a buffer of ids (B, S) with a bool mask (B, S) that is False at padding and from `end` on,
so that neither padding nor free slots change a result.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

BANNED = float("-inf")


def process_logits(
    logits_BV: Array,
    ids_BS: Array,
    mask_BS: Array,
    end: int | Array,
    made: int | Array,
    settings: Any,
) -> Array:
    """Applies what holds for greedy search, sampling and beams alike.

    Args:
        logits_BV: float32 logits, or log-probabilities in beam search.
        ids_BS: Prompt and generated tokens.
        mask_BS: bool, False at padding and from `end` on.
        end: Slots in use.
        made: How many of the tokens were generated.
        settings: What to apply: a `GenerationConfig`, or its traced form in a compiled program.
    """
    if _is_on(settings.repetition_penalty, 1):
        logits_BV = repetition_penalty(logits_BV, ids_BS, mask_BS, settings.repetition_penalty)
    if settings.no_repeat_ngram_size:
        logits_BV = no_repeat_ngram(logits_BV, ids_BS, mask_BS, end, settings.no_repeat_ngram_size)
    for word in settings.bad_words_ids or ():
        if word not in {(i,) for i in settings.eos_ids}:
            logits_BV = ban_word(logits_BV, ids_BS, mask_BS, end, word)
    fewest = 0 if settings.min_new_tokens is None else settings.min_new_tokens
    if _is_on(settings.min_length, 0) or _is_on(fewest, 0):
        is_short_B = (mask_BS.sum(1) < settings.min_length) | (made < fewest)
        logits_BV = jnp.where(
            is_short_B[:, None], ban_tokens(logits_BV, settings.eos_ids), logits_BV
        )
    if settings.suppress_tokens:
        logits_BV = ban_tokens(logits_BV, settings.suppress_tokens)
    if settings.begin_suppress_tokens:
        first = ban_tokens(logits_BV, settings.begin_suppress_tokens)
        logits_BV = jnp.where(jnp.equal(made, 0), first, logits_BV)
    return logits_BV


def repetition_penalty(
    logits_BV: Array, ids_BS: Array, mask_BS: Array, penalty: float | Array
) -> Array:
    """Makes tokens that the row already has less likely (CTRL, arXiv 1909.05858)."""
    seen_BV = _scatter(logits_BV, ids_BS, mask_BS)
    penalised = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalised, logits_BV)


def no_repeat_ngram(
    logits_BV: Array, ids_BS: Array, mask_BS: Array, end: int | Array, size: int
) -> Array:
    """Bans every token that would complete an n-gram the row already has."""
    windows, before = ids_BS.shape[1] - size + 1, size - 1
    if windows < 1:
        return logits_BV
    tail = lax.dynamic_slice_in_dim(ids_BS, end - before, before, 1)
    # Window i is ids[i : i + size]: its first `before` ids are compared with the tail, and
    # its last one is banned.
    repeats = jnp.ones((ids_BS.shape[0], windows), bool)
    for j in range(size):
        repeats &= mask_BS[:, j : j + windows]
        if j < before:
            repeats &= ids_BS[:, j : j + windows] == tail[:, j : j + 1]
    return jnp.where(_scatter(logits_BV, ids_BS[:, before:], repeats), BANNED, logits_BV)


def ban_word(
    logits_BV: Array, ids_BS: Array, mask_BS: Array, end: int | Array, word: Sequence[int]
) -> Array:
    """Bans the last token of a word wherever the row ends in the rest of it."""
    *start, last = word
    if len(start) > ids_BS.shape[1]:
        return logits_BV
    matches = jnp.full(ids_BS.shape[0], True) & (end >= len(start))
    for j, token in enumerate(start):
        place = end - len(start) + j
        matches &= lax.dynamic_index_in_dim(ids_BS, place, 1, keepdims=False) == token
        matches &= lax.dynamic_index_in_dim(mask_BS, place, 1, keepdims=False)
    return logits_BV.at[:, last].set(jnp.where(matches, BANNED, logits_BV[:, last]))


def ban_tokens(logits_BV: Array, ids: Sequence[int]) -> Array:
    """Bans tokens in every row."""
    return logits_BV.at[:, jnp.array(ids, jnp.int32)].set(BANNED)


def candidates(logits_BV: Array, settings: Any) -> tuple[Array, Array]:
    """The tokens to draw among.

    Args:
        logits_BV: float32 logits.
        settings: temperature, top_k, top_p, min_p and typical_p, applied in this order.

    Returns:
        Their logits, likeliest first and -inf for what the filters left out, and their ids,
        (B, C) each.
    """
    V = logits_BV.shape[-1]
    logits_BC, ids_BC = top_k(logits_BV / settings.temperature, min(settings.top_k or V, V))
    if _is_on(settings.top_p, 1):
        logits_BC = top_p(logits_BC, settings.top_p)
    if settings.min_p is not None:
        logits_BC = min_p(logits_BC, settings.min_p)
    if _is_on(settings.typical_p, 1):
        logits_BC = typical_p(logits_BC, settings.typical_p)
    return logits_BC, ids_BC


def top_k(logits_BV: Array, k: int) -> tuple[Array, Array]:
    """The k largest logits, in descending order, and their ids."""
    return lax.top_k(logits_BV, k)


def top_p(logits_BC: Array, p: float | Array) -> Array:
    """Keeps the fewest likeliest tokens whose probabilities reach p; logits in descending order."""
    probabilities = jax.nn.softmax(logits_BC, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    kept = (before < p).at[:, 0].set(True)
    return jnp.where(kept, logits_BC, BANNED)


def min_p(logits_BC: Array, p: float | Array) -> Array:
    """Keeps tokens at least p times as likely as the likeliest; logits in descending order."""
    probabilities = jax.nn.softmax(logits_BC, -1)
    return jnp.where(probabilities < p * probabilities[:, :1], BANNED, logits_BC)


def typical_p(logits_BC: Array, p: float | Array) -> Array:
    """Keeps the tokens of nearly expected information, until their probabilities exceed p."""
    information = -jax.nn.log_softmax(logits_BC, -1)
    probabilities = jax.nn.softmax(logits_BC, -1)
    entropy = jnp.where(probabilities > 0, probabilities * information, 0).sum(-1, keepdims=True)
    distance = jnp.abs(information - entropy)
    order = jnp.argsort(distance, -1, stable=True)
    ordered = jnp.take_along_axis(probabilities, order, -1)
    count = (jnp.cumsum(ordered, -1) < p).sum(-1, keepdims=True)
    last = jnp.take_along_axis(order, count.clip(max=logits_BC.shape[-1] - 1), -1)
    furthest = jnp.take_along_axis(distance, last, -1)
    return jnp.where(distance > furthest, BANNED, logits_BC)


def draw_tokens(logits_BC: Array, ids_BC: Array, key: Array) -> Array:
    """Draws one of the candidates in each row, (B,) ids."""
    choice = jax.random.categorical(key, logits_BC, -1)
    return jnp.take_along_axis(ids_BC, choice[:, None], -1)[:, 0]


def select_tokens(logits_BV: Array, settings: Any, key: Array) -> Array:
    """The next token of each row, (B,): the likeliest, or drawn where `do_sample` is set."""
    if not settings.do_sample:
        return logits_BV.argmax(-1).astype(jnp.int32)
    return draw_tokens(*candidates(logits_BV, settings), key).astype(jnp.int32)


def _is_on(value: Any, off: float) -> bool:
    """Whether a filter has to be applied: its number is traced, or is not the one that is off."""
    return isinstance(value, Array) or value != off


def _scatter(logits_BV: Array, ids_BX: Array, marks_BX: Array) -> Array:
    """A bool (B, V) that is True at the ids that are marked."""
    rows = jnp.arange(ids_BX.shape[0])[:, None]
    return jnp.zeros(logits_BV.shape, bool).at[rows, ids_BX].max(marks_BX)
