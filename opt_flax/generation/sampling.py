"""Choosing the next token: filters of logits and draws, all pure functions.

Their meanings are those of `transformers`; `opt_core.generation.filters` says their order. What a
row has so far is given as a buffer of ids (B, S) with a bool mask (B, S) that is False at padding
and from `end` on, so that neither padding nor free slots change a result.
"""

import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import Array, lax

from opt_core.generation.request import Request
from opt_core.generation.rules import BANNED, TOP_H_TOKENS, Rules, make_rules

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def request_rules(model: "FlaxOPTForCausalLM", request: Request, key: Array | None = None) -> Rules:
    """The rules that a program of generation is made for, and the numbers it is given.

    Args:
        model: The language model.
        request: What to generate.
        key: Source of random numbers; None: the request's seed.
    """
    structure, numbers = make_rules(request, is_compiled=True)
    if key is None:
        key = make_key(request.seed)
    arrays = jax.device_put(numbers)  # once, not at every call
    return Rules(structure, arrays | {"key": key})


def as_key(source: int | Array) -> Array:
    """The key of a seed, or of a key of either kind."""
    if isinstance(source, int):
        return make_key(source)
    is_key = jnp.issubdtype(source.dtype, jax.dtypes.prng_key)
    return source if is_key else jax.random.wrap_key_data(source)


def make_key(seed: int) -> Array:
    """The source of random numbers of a seed, 0 to 2**63 - 1."""
    return jax.random.fold_in(jax.random.key(seed % 2**31), seed // 2**31)


def random_source(model: "FlaxOPTForCausalLM", seed: int) -> Callable[[int], Array]:
    """The source that the token of each number is drawn from."""
    key = make_key(seed)
    return lambda made: jax.random.fold_in(key, made)


def draw_seed(source: Array | None = None) -> int:
    """A seed out of a key; None: a fresh one, for JAX has no generator that could decide it."""
    if source is None:
        return secrets.randbits(63)
    high, low = (int(x) for x in jax.random.bits(as_key(source), (2,)))
    return high % 2**31 * 2**32 + low


def drawn_key(source: int | Array) -> Array:
    """The key of a seed, or of what `draw_seed` takes out of a key; both may be traced."""
    if isinstance(source, int):
        return make_key(source)
    if source.ndim == 0 and jnp.issubdtype(source.dtype, jnp.integer):  # 31 bits are enough there
        return jax.random.fold_in(jax.random.key(source), 0)
    high, low = jax.random.bits(as_key(source), (2,))
    half = jnp.uint32(2**31)
    return jax.random.fold_in(jax.random.key(low % half), high % half * 2 + low // half)


def add_bias(logits_BV: Array, bias_V: Array) -> Array:
    """Adds to the logit of each id, in all rows alike or (B, V); others never come."""
    missing = logits_BV.shape[1] - bias_V.shape[-1]  # rows of a vocabulary that a mesh divides
    wider = (*((0, 0),) * (bias_V.ndim - 1), (0, missing))
    return logits_BV + jnp.pad(bias_V, wider, constant_values=BANNED)


def add_biases(logits_BV: Array, ids: Array, is_meant: Array, bias: Array) -> Array:
    """Adds to the logits of some ids in the rows that are meant; ids may come more than once."""
    return logits_BV.at[:, ids].add(jnp.where(is_meant, bias, 0))


def repetition_penalty(
    logits_BV: Array, ids_BS: Array, mask_BS: Array, penalty: float | Array
) -> Array:
    """Makes tokens that the row already has less likely (CTRL, arXiv 1909.05858)."""
    seen_BV = _mark(logits_BV, ids_BS, mask_BS)
    penalised = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(seen_BV, penalised, logits_BV)


def ban_marked(logits_BV: Array, ids_BS: Array, marks_BS: Array) -> Array:
    """Bans the ids that are marked."""
    return jnp.where(_mark(logits_BV, ids_BS, marks_BS), BANNED, logits_BV)


def ban_end(
    logits_BV: Array,
    mask_BS: Array,
    least: int | Array,
    is_early: bool | Array,
    ends_V: Array,
) -> Array:
    """Bans the ends of rows that have fewer than `least` tokens, or for which it is too early."""
    is_short_B = (mask_BS.sum(1) < least) | is_early
    return jnp.where(is_short_B[:, None] & _widen(ends_V, logits_BV), BANNED, logits_BV)


def force_tokens(logits_BV: Array, forced_V: Array, is_time: bool | Array) -> Array:
    """Lets nothing but some tokens, if there are any, come in the rows for which it is time."""
    is_time = jnp.reshape(is_time, (-1, 1)) & forced_V.any()
    return jnp.where(is_time, jnp.where(_widen(forced_V, logits_BV), 0, BANNED), logits_BV)


def repair(logits_BV: Array) -> Array:
    """Finite numbers in place of what is none: 0 for NaN, the largest and smallest there are."""
    return jnp.nan_to_num(logits_BV, nan=0.0)


def favour_end(logits_BV: Array, power: int | Array, factor: float | Array, ends_V: Array) -> Array:
    """Makes the ends likelier by a factor to a power, in rows in which that is positive."""
    power = jnp.reshape(power, (-1, 1))
    extra = jnp.abs(logits_BV) * (jnp.float32(factor) ** power - 1)
    is_meant = (power > 0) & _widen(ends_V, logits_BV) & jnp.isfinite(logits_BV)
    return jnp.where(is_meant, logits_BV + extra, logits_BV)


def normalize(logits_BV: Array) -> Array:
    """Their log-probabilities."""
    return jax.nn.log_softmax(logits_BV, -1)


def token_before(ids_BS: Array, mask_BS: Array, end: int | Array, back: int) -> tuple[Array, Array]:
    """The tokens so many slots before `end`, and whether they are there and real, (B,)."""
    place = jnp.maximum(end - back, 0)
    ids_B, is_real_B = (
        lax.dynamic_index_in_dim(x, place, 1, keepdims=False) for x in (ids_BS, mask_BS)
    )
    return ids_B, is_real_B & (end >= back)


def shift(values_BS: Array, count: int) -> Array:
    """Each slot's value so many slots before it; 0 or False where there is none."""
    S = values_BS.shape[1]
    return jnp.pad(values_BS, ((0, 0), (count, 0)))[:, :S]


def sort_logits(logits_BV: Array, count: int) -> tuple[Array, Array]:
    """The `count` largest logits, in descending order, and their ids."""
    return lax.top_k(logits_BV, count)


def top_h(logits_BC: Array, share: float | Array, fewest: int) -> Array:
    """Keeps the likeliest tokens that bear a share of the entropy (arXiv 2509.02510)."""
    p = jax.nn.softmax(logits_BC[:, :TOP_H_TOKENS], -1)
    entropy = jnp.cumsum(jnp.where(p > 0, -p * jnp.log(p), 0), -1)
    missing = logits_BC.shape[1] - p.shape[1]
    is_kept = jnp.pad(entropy <= share * entropy[:, -1:], ((0, 0), (0, missing)))
    return _keep(logits_BC, is_kept, fewest)


def top_k(logits_BC: Array, k: int | Array, fewest: int) -> Array:
    """Keeps the k likeliest tokens; logits in descending order, as for all that follow."""
    return _keep(logits_BC, jnp.arange(logits_BC.shape[1])[None] < k, fewest)


def top_p(logits_BC: Array, p: float | Array, fewest: int) -> Array:
    """Keeps the fewest likeliest tokens whose probabilities reach p."""
    probabilities = jax.nn.softmax(logits_BC, -1)
    before = jnp.cumsum(probabilities, -1) - probabilities
    return _keep(logits_BC, before < p, fewest)


def min_p(logits_BC: Array, p: float | Array, fewest: int) -> Array:
    """Keeps tokens at least p times as likely as the likeliest."""
    share = jnp.exp(logits_BC - logits_BC[:, :1])
    return _keep(logits_BC, share >= p, fewest)


def typical_p(logits_BC: Array, p: float | Array, fewest: int) -> Array:
    """Keeps the tokens of nearly expected information, until their probabilities exceed p."""
    information = -jax.nn.log_softmax(logits_BC, -1)
    probabilities = jax.nn.softmax(logits_BC, -1)
    distance = jnp.abs(information - _entropy(logits_BC))
    order = jnp.argsort(distance, -1, stable=True)
    ordered = jnp.take_along_axis(probabilities, order, -1)
    count = (jnp.cumsum(ordered, -1) < p).sum(-1, keepdims=True)
    place = count.clip(fewest - 1, logits_BC.shape[-1] - 1)
    furthest = jnp.take_along_axis(distance, jnp.take_along_axis(order, place, -1), -1)
    return jnp.where(distance > furthest, BANNED, logits_BC)


def epsilon_cutoff(logits_BC: Array, least: float | Array, fewest: int) -> Array:
    """Keeps tokens at least so probable (arXiv 2210.15191)."""
    return _keep(logits_BC, jax.nn.softmax(logits_BC, -1) >= least, fewest)


def eta_cutoff(logits_BC: Array, least: float | Array, fewest: int) -> Array:
    """Keeps tokens at least so probable, or fewer where much is possible (arXiv 2210.15191)."""
    eta = jnp.sqrt(jnp.float32(least)) * jnp.exp(-_entropy(logits_BC))
    return _keep(logits_BC, jax.nn.softmax(logits_BC, -1) >= jnp.minimum(least, eta), fewest)


def draw_tokens(logits_BC: Array, ids_BC: Array, key: Array) -> Array:
    """Draws one of the candidates in each row, (B,) ids."""
    choice = jax.random.categorical(key, logits_BC, -1)
    return jnp.take_along_axis(ids_BC, choice[:, None], -1)[:, 0]


def likeliest_tokens(logits_BV: Array) -> Array:
    """The likeliest token of each row, (B,) ids."""
    return logits_BV.argmax(-1).astype(jnp.int32)


def _mark(logits_BV: Array, ids_BS: Array, marks_BS: Array) -> Array:
    """A bool (B, V) that is True at the ids that are marked."""
    rows = jnp.arange(ids_BS.shape[0])[:, None]
    return jnp.zeros(logits_BV.shape, bool).at[rows, ids_BS].max(marks_BS)


def _widen(marks_V: Array, logits_BV: Array) -> Array:
    """False for the rows of a vocabulary that only a mesh needs."""
    return jnp.pad(marks_V, (0, logits_BV.shape[1] - marks_V.shape[0]))


def _keep(logits_BC: Array, is_kept_BC: Array, fewest: int) -> Array:
    """Leaves out what is not kept, but for the first `fewest`."""
    return jnp.where(is_kept_BC.at[:, :fewest].set(True), logits_BC, BANNED)


def _entropy(logits_BC: Array) -> Array:
    """Expected information of a draw, (B, 1)."""
    p = jax.nn.softmax(logits_BC, -1)
    surprise = jnp.where(p > 0, -p * jax.nn.log_softmax(logits_BC, -1), 0)
    return surprise.sum(-1, keepdims=True)
