"""Choosing the next token: filters of logits and draws, all pure functions.

Their meanings are those of `transformers`; `opt_core.generation.filters` says their order. What a
row has so far is given as a buffer of ids (B, S) with a bool mask (B, S) that is False at padding
and from `end` on, so that neither padding nor free slots change a result.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

BANNED = float("-inf")


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


def ban_end(
    logits_BV: Array,
    mask_BS: Array,
    least: int | Array,
    is_early: bool | Array,
    eos_ids: Sequence[int],
) -> Array:
    """Bans the ends of rows that have fewer than `least` tokens, or for which it is too early."""
    is_short_B = (mask_BS.sum(1) < least) | is_early
    return jnp.where(is_short_B[:, None], ban_tokens(logits_BV, eos_ids), logits_BV)


def ban_tokens(logits_BV: Array, ids: Sequence[int]) -> Array:
    """Bans tokens in every row."""
    return logits_BV.at[:, jnp.array(ids, jnp.int32)].set(BANNED)


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


def likeliest_tokens(logits_BV: Array) -> Array:
    """The likeliest token of each row, (B,) ids."""
    return logits_BV.argmax(-1).astype(jnp.int32)


def _scatter(logits_BV: Array, ids_BX: Array, marks_BX: Array) -> Array:
    """A bool (B, V) that is True at the ids that are marked."""
    rows = jnp.arange(ids_BX.shape[0])[:, None]
    return jnp.zeros(logits_BV.shape, bool).at[rows, ids_BX].max(marks_BX)
