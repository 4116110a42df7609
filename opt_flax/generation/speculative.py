"""Speculative decoding: several tokens are drafted, one pass of the model checks them all.

Drafts come from the row itself (prompt lookup) or from a smaller model. Greedy texts stay what they
are, and sampled ones keep their distribution (arXiv 2211.17192). Rows may be right about different
numbers of tokens; what is wrong stays in the cache as a gap that the mask hides.
"""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

from opt_core.generation import filters
from opt_core.generation.request import Ids, Request, check_logits
from opt_core.generation.rules import Rules
from opt_core.generation.speculation import Counts, Reader, Rows, speculate
from opt_flax.cache import KVCache
from opt_flax.compilation import read_prompts
from opt_flax.generation import loop, sampling
from opt_flax.programs import Program
from opt_flax.sharding import replicate

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def stream(model: "FlaxOPTForCausalLM", request: Request) -> Iterator[Array]:
    """Drafts, checks and yields until every row has ended.

    Args:
        model: The language model.
        request: What to generate, with an assistant or `prompt_lookup_num_tokens`.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended; several in a row
        where drafts were right.
    """
    for column in speculate(model, request, _Reader):
        yield jnp.asarray(column)


def generate(model: "FlaxOPTForCausalLM", request: Request) -> Array:
    """The prompts and all that `stream` yields after them."""
    return jnp.asarray(request.join(stream(model, request)))


def accept_draft(
    scores_RTV: Array,
    draft_RG: Array,
    counts_R: Array,
    probs_RGV: Array | None,
    rules: Rules,
    key: Array,
) -> tuple[Array, Array]:
    """Which drafted tokens are right, and the token after them.

    A sampled token that its draft gave the probability q, and the model p, is right with
    probability min(1, p / q); the token after a wrong one is drawn from what p has more than q.

    Args:
        scores_RTV: Constrained logits of a row's next token, and of the one after each drafted.
        draft_RG: G = T - 1 ids.
        counts_R: How many of them were drafted.
        probs_RGV: The probabilities they were drawn by; None: they were not drawn.
        rules: Those of the request.
        key: Source of random numbers.

    Returns:
        (R, T) ids and how many of them count, (R,): the drafted ones that are right and one
        token more.
    """
    R, T, V = scores_RTV.shape
    is_drafted = jnp.arange(T - 1) < counts_R[:, None]
    if not rules.do_sample:
        tokens = scores_RTV.argmax(-1).astype(jnp.int32)
        right = is_drafted & (tokens[:, :-1] == draft_RG)
        return tokens, jnp.cumprod(right, 1, dtype=jnp.int32).sum(1) + 1
    p_RTV = probabilities(scores_RTV.reshape(R * T, V), rules).reshape(R, T, V)
    # What was not drawn was certain.
    q_RGV = jax.nn.one_hot(draft_RG, V) if probs_RGV is None else probs_RGV
    places = draft_RG[..., None]
    p, q = (jnp.take_along_axis(x, places, 2)[..., 0] for x in (p_RTV[:, :-1], q_RGV))
    key, other = jax.random.split(key)
    chance = jax.random.uniform(other, p.shape)
    right = jnp.cumprod(is_drafted & (chance * q < p), 1, dtype=jnp.int32).sum(1)
    row = jnp.arange(R)
    q_RTV = jnp.pad(q_RGV * is_drafted[..., None], ((0, 0), (0, 1), (0, 0)))
    p_RV = p_RTV[row, right]
    rest = (p_RV - q_RTV[row, right]).clip(min=0)
    # Where rounding alone refused a token, nothing is left.
    rest = jnp.where(rest.sum(1, keepdims=True) > 0, rest, p_RV)
    tokens = jnp.pad(draft_RG, ((0, 0), (0, 1))).astype(jnp.int32)
    return tokens.at[row, right].set(_draw(rest, key)), right + 1


def probabilities(logits_BV: Array, rules: Rules) -> Array:
    """Probabilities (B, V) that sampling draws the next token by."""
    logits_BC, ids_BC = filters.candidates(sampling, logits_BV, rules)
    rows = jnp.arange(len(logits_BV))[:, None]
    return jnp.zeros_like(logits_BV).at[rows, ids_BC].set(jax.nn.softmax(logits_BC, -1))


class _History(NamedTuple):
    """Texts that filters read (`Rows.histories`): (R, X, W) ids, their mask, and (R, X) counts."""

    ids: Any
    mask: Any
    made: Any


class _Place(NamedTuple):
    """Where new tokens go: slots in use, their mask (R, S) or None, and positions (R, T)."""

    length: Any
    mask: Any
    positions: Any


class _Reader(Reader):
    """A model and what it has read."""

    def __init__(self, model: "FlaxOPTForCausalLM", request: Request, rows: Rows, slots: int):
        super().__init__(model, request, rows, slots)
        self.graph, self.state = nnx.split(model)
        self.is_bare = len(rows.texts) == 1 and self.slots.is_plain  # and stays so
        self.rules = sampling.request_rules(model, request)
        parts, copies = (self.graph, self.state), request.settings.num_return_sequences
        logits, cache = read_prompts(model, parts, request, slots, copies)
        self.keys, self.values = cache.keys, cache.values
        self.token, self.best = _open(logits, self._history(rows.no_draft), self.rules, model.mesh)

    def first_tokens(self) -> Ids:
        check_logits(np.asarray(self.best))
        return np.asarray(self.token)

    def propose(self, count: int, step: int) -> tuple[Ids, Array | None]:
        draft, probs, self.keys, self.values = _propose(
            self.graph, self.state, self.keys, self.values, self._place(count + 1, 2),
            self.rows.newest(2), self._history(self.rows.no_draft), self._rules(step), count,
        )  # fmt: skip
        return np.asarray(draft), probs

    def check(
        self, draft: Ids, counts: Counts, probs: Array | None, step: int
    ) -> tuple[Ids, Counts]:
        ids = np.concatenate([self.rows.newest(1), draft], 1)
        tokens, kept, self.keys, self.values = _check(
            self.graph, self.state, self.keys, self.values, self._place(ids.shape[1], 1), ids,
            counts, probs, self._history(draft), self._rules(step),
        )  # fmt: skip
        return np.asarray(tokens), np.asarray(kept)

    def reorder(self, order: Ids) -> None:
        self.keys, self.values = _reorder(self.keys, self.values, order)

    def _rules(self, step: int) -> Rules:
        return self.rules.replace(key=jax.random.fold_in(self.rules.key, step))

    def _history(self, draft: Ids) -> _History:
        return _History(*self.histories(draft))

    def _place(self, count: int, newest: int) -> _Place:
        mask = None if self.is_bare else self.slots.mask
        return _Place(np.int32(self.slots.length), mask, self.positions(count, newest))


@partial(Program, static_argnames="mesh")
def _open(
    logits_RV: Array, history: _History, rules: Rules, mesh: Mesh | None
) -> tuple[Array, Array]:
    """The first token of each row, and the highest logit it was chosen by."""
    scores = _constrained(logits_RV[:, None], history._replace(made=0), rules)[:, 0]
    token = filters.select_tokens(sampling, scores, rules, rules.key)
    return replicate(token, mesh), replicate(scores.max(-1), mesh)


@partial(Program, static_argnames="graph", donate_argnames=("keys", "values"))
def _check(
    graph: Any, state: Any, keys: tuple[Array, ...], values: tuple[Array, ...], place: _Place,
    ids_RT: Array, counts_R: Array, probs_RGV: Array | None, history: _History,
    rules: Rules,
) -> tuple[Array, Array, tuple[Array, ...], tuple[Array, ...]]:  # fmt: skip
    """The answer of `accept_draft` for the draft behind each newest token, and the new buffers."""
    model = nnx.merge(graph, state)
    cache = KVCache(keys, values, place.length, place.mask)
    logits, cache = _read(model, ids_RT, place.positions, cache)
    scores = _constrained(logits, history, rules)
    found = accept_draft(scores, ids_RT[:, 1:], counts_R, probs_RGV, rules, rules.key)
    tokens, counts = (replicate(x, model.mesh) for x in found)
    return tokens, counts, cache.keys, cache.values


@partial(Program, static_argnames=("graph", "count"), donate_argnames=("keys", "values"))
def _propose(
    graph: Any, state: Any, keys: tuple[Array, ...], values: tuple[Array, ...], place: _Place,
    newest_R2: Array, history: _History, rules: Rules, count: int,
) -> tuple[Array, Array | None, tuple[Array, ...], tuple[Array, ...]]:  # fmt: skip
    """Tokens (R, count) one after the other, their probabilities, and the cache's buffers."""
    model = nnx.merge(graph, state)

    def step(carry: Any, inputs: Any) -> Any:
        (ids, cache, history), (positions, key) = carry, inputs
        logits, cache = _read(model, ids, positions, cache)
        scores = _constrained(logits[:, -1:], history, rules)[:, 0]
        p = probabilities(scores, rules) if rules.do_sample else None
        token = scores.argmax(-1) if p is None else _draw(p, key)
        token = token.astype(jnp.int32)[:, None]
        ids = jnp.concatenate([history.ids[:, :, 1:], token[..., None]], 2)
        mask = jnp.roll(history.mask, -1, 2).at[:, :, -1].set(True)
        return (token, cache, _History(ids, mask, history.made + 1)), (token[:, 0], p)

    # Another key than the one that drafts are checked by.
    draws = jax.random.split(jax.random.fold_in(rules.key, 1), count)
    cache = KVCache(keys, values, place.length, place.mask)
    carry, first = step((newest_R2, cache, history), (place.positions[:, :2], draws[0]))
    others = place.positions[:, 2:].T[..., None]
    (_, cache, _), rest = lax.scan(step, carry, (others, draws[1:]))
    made = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]).swapaxes(0, 1), first, rest)
    return replicate(made[0], model.mesh), made[1], cache.keys, cache.values


@partial(Program, donate_argnames=("keys", "values"))
def _reorder(keys: Any, values: Any, order_RS: Array) -> tuple[Any, Any]:
    """The buffers with their slots in another order."""
    order = order_RS[:, None, :, None]
    return jax.tree.map(lambda x: jnp.take_along_axis(x, order, 2), (keys, values))


def _read(
    model: "FlaxOPTForCausalLM", ids_RT: Array, positions_RT: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """Logits (R, T, V) after each of these tokens, and the cache that holds them."""
    decoder = model.get_decoder()
    embeds = decoder.embed_tokens(ids_RT)
    out = decoder(embeds, positions_RT, cache.mask, cache, deterministic=True)
    assert out.last_hidden_state is not None
    assert out.past_key_values is not None
    return model.compute_logits(out.last_hidden_state), out.past_key_values


def _constrained(logits_RTV: Array, history: _History, rules: Rules) -> Array:
    """Constrained logits (R, T, V) of the tokens after T histories of each row."""
    (R, T, V), W = logits_RTV.shape, history.ids.shape[2]
    made = history.made if isinstance(history.made, int) else history.made.reshape(R * T)
    is_last = made + 1 == rules.new_tokens
    ids, mask = (x.reshape(R * T, W) for x in history[:2])
    scores = loop.mask_vocabulary(logits_RTV.reshape(R * T, V), rules.vocabulary)
    scores = filters.process_logits(sampling, scores, ids, mask, W, made, rules, is_last)
    return scores.reshape(R, T, V)


def _draw(probabilities_BV: Array, key: Array) -> Array:
    B, V = probabilities_BV.shape
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (B, V))
    return sampling.draw_tokens(jnp.log(probabilities_BV), ids, key)
