"""Choosing the next token: filters of logits and draws, all pure functions.

Their meanings are those of `transformers`; `opt_core.generation.filters` says their order. What a
row has so far is given as ids (B, S) with a bool mask (B, S) that is False at padding and at slots
not filled yet, so that neither ever changes a result. In a compiled program the numbers are
tensors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from opt_tf.linear import sizes

BANNED = float("-inf")


def repetition_penalty(
    logits_BV: tf.Tensor, ids_BS: tf.Tensor, mask_BS: tf.Tensor, penalty: float | tf.Tensor
) -> tf.Tensor:
    """Makes tokens that the row already has less likely (CTRL, arXiv 1909.05858)."""
    seen_BV = _marked(logits_BV, ids_BS, mask_BS)
    penalised = tf.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return tf.where(seen_BV, penalised, logits_BV)


def no_repeat_ngram(
    logits_BV: tf.Tensor, ids_BS: tf.Tensor, mask_BS: tf.Tensor, end: int | tf.Tensor, size: int
) -> tf.Tensor:
    """Bans every token that would complete an n-gram the row already has."""
    count = sizes(ids_BS)[1] - size + 1
    if count < 1:
        return logits_BV
    tail, is_real_B = _tail(ids_BS, mask_BS, end, size - 1)
    # Window i is ids[i : i + size]: its first ids are compared with the tail, its last one is
    # banned.
    repeats = tf.repeat(is_real_B[:, None], count, 1) & mask_BS[:, size - 1 :]
    for i in range(size - 1):
        repeats &= mask_BS[:, i : i + count] & (ids_BS[:, i : i + count] == tail[:, i, None])
    return tf.where(_marked(logits_BV, ids_BS[:, size - 1 :], repeats), BANNED, logits_BV)


def ban_word(
    logits_BV: tf.Tensor,
    ids_BS: tf.Tensor,
    mask_BS: tf.Tensor,
    end: int | tf.Tensor,
    word: Sequence[int],
) -> tf.Tensor:
    """Bans the last token of a word wherever the row ends in the rest of it."""
    *start, last = word
    tail, is_real_B = _tail(ids_BS, mask_BS, end, len(start))
    matches = is_real_B & tf.reduce_all(tail == tf.constant(start, tf.int32), 1)
    is_last_V = tf.range(sizes(logits_BV)[1]) == last
    return tf.where(matches[:, None] & is_last_V, BANNED, logits_BV)


def ban_end(
    logits_BV: tf.Tensor,
    mask_BS: tf.Tensor,
    least: int | tf.Tensor,
    is_early: bool | tf.Tensor,
    eos_ids: Sequence[int],
) -> tf.Tensor:
    """Bans the ends of rows that have fewer than `least` tokens, or for which it is too early."""
    is_short_B = (tf.reduce_sum(tf.cast(mask_BS, tf.int32), 1) < least) | is_early
    return tf.where(is_short_B[:, None], ban_tokens(logits_BV, eos_ids), logits_BV)


def ban_tokens(logits_BV: tf.Tensor, ids: Sequence[int]) -> tf.Tensor:
    """Bans tokens in every row."""
    is_banned_V = np.zeros(sizes(logits_BV)[1], bool)
    is_banned_V[list(ids)] = True
    return tf.where(is_banned_V, BANNED, logits_BV)


def top_k(logits_BV: tf.Tensor, k: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The k largest logits, in descending order, and their ids."""
    return tf.math.top_k(logits_BV, k)


def top_p(logits_BC: tf.Tensor, p: float | tf.Tensor) -> tf.Tensor:
    """Keeps the fewest likeliest tokens whose probabilities reach p; logits in descending order."""
    probabilities = tf.nn.softmax(logits_BC, -1)
    before = tf.cumsum(probabilities, -1) - probabilities
    is_first = tf.range(sizes(logits_BC)[1]) == 0
    return tf.where((before < p) | is_first, logits_BC, BANNED)


def min_p(logits_BC: tf.Tensor, p: float | tf.Tensor) -> tf.Tensor:
    """Keeps tokens at least p times as likely as the likeliest; logits in descending order."""
    probabilities = tf.nn.softmax(logits_BC, -1)
    return tf.where(probabilities < p * probabilities[:, :1], BANNED, logits_BC)


def typical_p(logits_BC: tf.Tensor, p: float | tf.Tensor) -> tf.Tensor:
    """Keeps the tokens of nearly expected information, until their probabilities exceed p."""
    information = -tf.nn.log_softmax(logits_BC, -1)
    probabilities = tf.nn.softmax(logits_BC, -1)
    surprise = tf.where(probabilities > 0, probabilities * information, 0)
    distance = tf.abs(information - tf.reduce_sum(surprise, -1, keepdims=True))
    order = tf.argsort(distance, stable=True)
    mass = tf.cumsum(tf.gather(probabilities, order, batch_dims=1), -1)
    count = tf.reduce_sum(tf.cast(mass < p, tf.int32), -1, keepdims=True)
    last = tf.minimum(count, sizes(logits_BC)[1] - 1)
    furthest = tf.gather(distance, tf.gather(order, last, batch_dims=1), batch_dims=1)
    return tf.where(distance > furthest, BANNED, logits_BC)


def draw_tokens(logits_BC: tf.Tensor, ids_BC: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Draws one of the candidates in each row, (B,) ids.

    Args:
        logits_BC: Their logits.
        ids_BC: Their ids.
        seed: int64 (2,): the seed of the text and the number of the token.
    """
    # Whole numbers, of one algorithm: these are the same with XLA and without, fractions are not.
    whole: Any = {"minval": None, "maxval": None, "dtype": tf.uint32}
    bits = tf.random.stateless_uniform(tf.shape(logits_BC), seed, **whole, alg="philox")
    uniform = (tf.cast(tf.bitwise.right_shift(bits, 9), tf.float32) + 0.5) * 2**-23
    gumbel = -tf.math.log(-tf.math.log(uniform))
    choice = tf.argmax(logits_BC + gumbel, -1, output_type=tf.int32)
    return tf.gather(ids_BC, choice, batch_dims=1)


def likeliest_tokens(logits_BV: tf.Tensor) -> tf.Tensor:
    """The likeliest token of each row, (B,) ids."""
    return tf.argmax(logits_BV, -1, output_type=tf.int32)


def _marked(logits_BV: tf.Tensor, ids_BS: tf.Tensor, mask_BS: tf.Tensor) -> tf.Tensor:
    """Bool (B, V): the ids where the mask is True."""
    rows = tf.repeat(tf.range(sizes(ids_BS)[0])[:, None], sizes(ids_BS)[1], 1)
    places = tf.stack([rows, ids_BS], -1)
    return tf.scatter_nd(places, tf.cast(mask_BS, tf.int32), tf.shape(logits_BV)) > 0


def _tail(
    ids_BS: tf.Tensor, mask_BS: tf.Tensor, end: int | tf.Tensor, count: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The last `count` ids before `end`, and whether all of them are there and real, (B,)."""
    places = end - count + tf.range(count)
    inside = tf.maximum(places, 0)
    is_real = tf.gather(mask_BS, inside, axis=1) & (places >= 0)
    return tf.gather(ids_BS, inside, axis=1), tf.reduce_all(is_real, 1)
