"""Choosing the next token: filters of logits and draws, all pure functions.

Their meanings are those of `transformers`; `opt_core.generation.filters` says their order. What a
row has so far is given as ids (B, S) with a bool mask (B, S) that is False at padding and at slots
not filled yet, so that neither ever changes a result.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from opt_core.generation.request import Request, pair_seed
from opt_core.generation.rules import BANNED, TOP_H_TOKENS, Rules, make_rules
from opt_tf.linear import sizes

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def request_rules(model: "TFOPTForCausalLM", request: Request) -> Rules:
    """The rules of a request as tensors, and how many prompt tokens are read at a time."""
    structure, numbers = make_rules(request, is_compiled=True)
    tensors = {name: tf.constant(value) for name, value in numbers.items()}
    return Rules(structure, tensors | {"chunk": request.chunk})


def random_source(model: "TFOPTForCausalLM", seed: int) -> Callable[[int], tf.Tensor]:
    """The source that the token of each number is drawn from."""
    return lambda made: tf.constant([seed, made], tf.int64)


def draw_seed(source: Any = None) -> int:
    """A seed out of a generator or a pair; None: TensorFlow's own (`tf.random.set_seed`)."""
    if source is not None and not hasattr(source, "uniform"):
        return pair_seed(*(int(part) for part in source))
    uniform = tf.random.uniform if source is None else source.uniform
    return int(uniform((), 0, 2**63 - 1, tf.int64))


def add_bias(logits_BV: tf.Tensor, bias_V: tf.Tensor) -> tf.Tensor:
    """Adds to the logit of each id, in all rows alike or (B, V)."""
    return logits_BV + bias_V


def add_biases(
    logits_BV: tf.Tensor, ids: tf.Tensor, is_meant: tf.Tensor, bias: tf.Tensor
) -> tf.Tensor:
    """Adds to the logits of some ids in the rows that are meant; ids may come more than once."""
    added = tf.transpose(tf.where(is_meant, bias, 0.0))
    added_VB = tf.math.unsorted_segment_sum(added, ids, sizes(logits_BV)[1])
    return logits_BV + tf.transpose(added_VB)


def repetition_penalty(
    logits_BV: tf.Tensor, ids_BS: tf.Tensor, mask_BS: tf.Tensor, penalty: float | tf.Tensor
) -> tf.Tensor:
    """Makes tokens that the row already has less likely (CTRL, arXiv 1909.05858)."""
    seen_BV = _mark(logits_BV, ids_BS, mask_BS)
    penalised = tf.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return tf.where(seen_BV, penalised, logits_BV)


def ban_marked(logits_BV: tf.Tensor, ids_BS: tf.Tensor, marks_BS: tf.Tensor) -> tf.Tensor:
    """Bans the ids that are marked."""
    return tf.where(_mark(logits_BV, ids_BS, marks_BS), BANNED, logits_BV)


def ban_end(
    logits_BV: tf.Tensor,
    mask_BS: tf.Tensor,
    least: int | tf.Tensor,
    is_early: bool | tf.Tensor,
    ends_V: tf.Tensor,
) -> tf.Tensor:
    """Bans the ends of rows that have fewer than `least` tokens, or for which it is too early."""
    is_short_B = (tf.reduce_sum(tf.cast(mask_BS, tf.int32), 1) < least) | is_early
    return tf.where(is_short_B[:, None] & ends_V, BANNED, logits_BV)


def force_tokens(logits_BV: tf.Tensor, forced_V: tf.Tensor, is_time: bool | tf.Tensor) -> tf.Tensor:
    """Lets nothing but some tokens, if there are any, come in the rows for which it is time."""
    is_time = tf.reshape(tf.convert_to_tensor(is_time), (-1, 1)) & tf.reduce_any(forced_V)
    return tf.where(is_time, tf.where(forced_V, 0.0, BANNED), logits_BV)


def repair(logits_BV: tf.Tensor) -> tf.Tensor:
    """Finite numbers in place of what is none: 0 for NaN, the largest and smallest there are."""
    logits_BV = tf.where(tf.math.is_nan(logits_BV), 0.0, logits_BV)
    return tf.clip_by_value(logits_BV, tf.float32.min, tf.float32.max)


def favour_end(
    logits_BV: tf.Tensor, power: int | tf.Tensor, factor: float | tf.Tensor, ends_V: tf.Tensor
) -> tf.Tensor:
    """Makes the ends likelier by a factor to a power, in rows in which that is positive."""
    power = tf.reshape(tf.cast(power, tf.float32), (-1, 1))
    extra = tf.abs(logits_BV) * (tf.cast(factor, tf.float32) ** power - 1)
    # LiteRT has no tf.math.is_finite.
    is_meant = (power > 0) & ends_V & (tf.abs(logits_BV) < float("inf"))
    return tf.where(is_meant, logits_BV + extra, logits_BV)


def normalize(logits_BV: tf.Tensor) -> tf.Tensor:
    """Their log-probabilities."""
    return tf.nn.log_softmax(logits_BV, -1)


def token_before(
    ids_BS: tf.Tensor, mask_BS: tf.Tensor, end: int | tf.Tensor, back: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """The tokens so many slots before `end`, and whether they are there and real, (B,)."""
    place = tf.maximum(end - back, 0)
    is_real_B = tf.gather(mask_BS, place, axis=1)
    return tf.gather(ids_BS, place, axis=1), is_real_B & (end >= back)


def shift(values_BS: tf.Tensor, count: int) -> tf.Tensor:
    """Each slot's value so many slots before it; 0 or False where there is none."""
    S = sizes(values_BS)[1]
    return tf.pad(values_BS, [[0, 0], [count, 0]])[:, :S]


def sort_logits(logits_BV: tf.Tensor, count: int) -> tuple[tf.Tensor, tf.Tensor]:
    """The `count` largest logits, in descending order, and their ids."""
    return tf.math.top_k(logits_BV, count)


def top_h(logits_BC: tf.Tensor, share: float | tf.Tensor, fewest: int) -> tf.Tensor:
    """Keeps the likeliest tokens that bear a share of the entropy (arXiv 2509.02510)."""
    p = tf.nn.softmax(logits_BC[:, :TOP_H_TOKENS], -1)
    entropy = tf.cumsum(tf.where(p > 0, -p * tf.math.log(p), 0.0), -1)
    missing = sizes(logits_BC)[1] - sizes(p)[1]
    is_kept = tf.pad(entropy <= share * entropy[:, -1:], [[0, 0], [0, missing]])
    return _keep(logits_BC, is_kept, fewest)


def top_k(logits_BC: tf.Tensor, k: int | tf.Tensor, fewest: int) -> tf.Tensor:
    """Keeps the k likeliest tokens; logits in descending order, as for all that follow."""
    return _keep(logits_BC, tf.range(sizes(logits_BC)[1]) < k, fewest)


def top_p(logits_BC: tf.Tensor, p: float | tf.Tensor, fewest: int) -> tf.Tensor:
    """Keeps the fewest likeliest tokens whose probabilities reach p."""
    probabilities = tf.nn.softmax(logits_BC, -1)
    before = tf.cumsum(probabilities, -1) - probabilities
    return _keep(logits_BC, before < p, fewest)


def min_p(logits_BC: tf.Tensor, p: float | tf.Tensor, fewest: int) -> tf.Tensor:
    """Keeps tokens at least p times as likely as the likeliest."""
    share = tf.exp(logits_BC - logits_BC[:, :1])
    return _keep(logits_BC, share >= p, fewest)


def typical_p(logits_BC: tf.Tensor, p: float | tf.Tensor, fewest: int) -> tf.Tensor:
    """Keeps the tokens of nearly expected information, until their probabilities exceed p."""
    information = -tf.nn.log_softmax(logits_BC, -1)
    distance = tf.abs(information - _entropy(logits_BC))
    order = tf.argsort(distance, stable=True)
    ordered = tf.gather(tf.nn.softmax(logits_BC, -1), order, batch_dims=1)
    count = tf.reduce_sum(tf.cast(tf.cumsum(ordered, -1) < p, tf.int32), -1, keepdims=True)
    place = tf.clip_by_value(count, fewest - 1, sizes(logits_BC)[1] - 1)
    furthest = tf.gather(distance, tf.gather(order, place, batch_dims=1), batch_dims=1)
    return tf.where(distance > furthest, BANNED, logits_BC)


def epsilon_cutoff(logits_BC: tf.Tensor, least: float | tf.Tensor, fewest: int) -> tf.Tensor:
    """Keeps tokens at least so probable (arXiv 2210.15191)."""
    return _keep(logits_BC, tf.nn.softmax(logits_BC, -1) >= least, fewest)


def eta_cutoff(logits_BC: tf.Tensor, least: float | tf.Tensor, fewest: int) -> tf.Tensor:
    """Keeps tokens at least so probable, or fewer where much is possible (arXiv 2210.15191)."""
    eta = tf.sqrt(tf.cast(least, tf.float32)) * tf.exp(-_entropy(logits_BC))
    return _keep(logits_BC, tf.nn.softmax(logits_BC, -1) >= tf.minimum(least, eta), fewest)


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


def _mark(logits_BV: tf.Tensor, ids_BS: tf.Tensor, marks_BS: tf.Tensor) -> tf.Tensor:
    """A bool (B, V) that is True at the ids that are marked."""
    rows = tf.repeat(tf.range(sizes(ids_BS)[0])[:, None], sizes(ids_BS)[1], 1)
    places = tf.stack([rows, ids_BS], -1)
    return tf.scatter_nd(places, tf.cast(marks_BS, tf.int32), tf.shape(logits_BV)) > 0


def _keep(logits_BC: tf.Tensor, is_kept_BC: tf.Tensor, fewest: int) -> tf.Tensor:
    """Leaves out what is not kept, but for the first `fewest`."""
    is_first_C = tf.range(sizes(logits_BC)[1]) < fewest
    return tf.where(is_kept_BC | is_first_C, logits_BC, BANNED)


def _entropy(logits_BC: tf.Tensor) -> tf.Tensor:
    """Expected information of a draw, (B, 1)."""
    p = tf.nn.softmax(logits_BC, -1)
    surprise = tf.where(p > 0, -p * tf.nn.log_softmax(logits_BC, -1), 0.0)
    return tf.reduce_sum(surprise, -1, keepdims=True)
