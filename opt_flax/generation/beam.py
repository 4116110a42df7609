"""Beam search on the same prefill and decode step as everything else, its loop on the device.

Its results equal those of `transformers` 5.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

from opt_core.generation import filters
from opt_core.generation.request import Request, allocate_tokens, check_logits
from opt_core.generation.rules import Rules
from opt_flax.cache import KVCache
from opt_flax.compilation import Prompts, read_prompts
from opt_flax.generation import loop, sampling
from opt_flax.generation.prefill import copy_rows, prefill_prompts
from opt_flax.programs import Program
from opt_flax.sharding import replicate

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM

NEG_INF = -1.0e9
"""Score of a place that holds no beam yet: finite, so that sums of it stay comparable."""


class Beams(NamedTuple):
    """A set of W hypotheses per prompt.

    Attributes:
        ids: (B, W, S) the prompt, generated tokens, and `pad` beyond a beam's length.
        scores: (B, W), best first.
        lengths: (B, W) tokens generated; 0 where there is no beam.
    """

    ids: Array
    scores: Array
    lengths: Array

    def pick(self, index_BX: Array) -> "Beams":
        """The hypotheses at some places of each prompt."""
        rows = jnp.arange(index_BX.shape[0])[:, None]
        return Beams(*(values[rows, index_BX] for values in self))

    def best(self, count: int) -> tuple["Beams", Array]:
        """The `count` best hypotheses, best first, and where they were."""
        index = lax.top_k(self.scores, count)[1]
        return self.pick(index), index


def search(model: "FlaxOPTForCausalLM", request: Request) -> Array:
    """Finds likely continuations by keeping the W best of them at every step.

    Args:
        model: The language model.
        request: A checked request with `num_beams` > 1.

    Returns:
        (B * num_return_sequences, T + new) ids, each prompt's best first.

    Raises:
        GenerationError: No token can come in a row.
    """
    (B, prompt), count = request.ids.shape, request.settings.num_return_sequences
    finished = _loop(*_start(model, request)).finished
    ids, lengths = (np.asarray(x)[:, :count] for x in (finished.ids, finished.lengths))
    return jnp.asarray(ids[:, :, : prompt + lengths.max()].reshape(B * count, -1))


def extend_beams(
    running: Beams, scores_RV: Array, end: Array, made: int | Array, rules: Rules
) -> tuple[Beams, Array]:
    """The best continuations of the running beams by one token.

    There are enough of them for W to remain should all others end.

    Args:
        running: The beams so far.
        scores_RV: Log-probabilities of the next token of each of the B * W beams.
        end: Slot of the next token.
        made: Tokens each beam has.
        rules: Those of the request.

    Returns:
        The grown beams, (B, C), and the number of the beam each came from, (B, C).
    """
    B, W = running.scores.shape
    V = scores_RV.shape[1]
    totals = (scores_RV.reshape(B, W, V) + running.scores[..., None]).reshape(B, W * V)
    count = min(max(2, 1 + rules.end_tokens) * W, W * V)
    scores, index = lax.top_k(totals, count)
    grown = running.pick(index // V)
    token = (index % V).astype(grown.ids.dtype)[..., None]
    ids = lax.dynamic_update_slice(grown.ids, token, (0, 0, end))
    return Beams(ids, scores, jnp.full_like(grown.lengths, made + 1)), index // V


def finish_beams(
    finished: Beams,
    grown: Beams,
    ends_BC: Array,
    made: int | Array,
    is_open: Array,
    rules: Rules,
) -> Beams:
    """The W best finished beams after some of the grown ones ended.

    Only a beam among the W best continuations may finish; the others are reserves.
    """
    W = finished.scores.shape[1]
    ends_BC = ends_BC & (jnp.arange(ends_BC.shape[1]) < W)
    closed = ~is_open | (rules.is_full_enough & (finished.lengths > 0).all(1, keepdims=True))
    scores = grown.scores / jnp.float32(made + 1) ** rules.length_penalty
    scores = scores + closed * NEG_INF + ~ends_BC * NEG_INF
    grown = Beams(grown.ids, scores, grown.lengths * ends_BC)
    both = Beams(*(jnp.concatenate(pair, 1) for pair in zip(finished, grown, strict=True)))
    return both.best(W)[0]


def can_improve(
    running: Beams, finished: Beams, made: int | Array, limit: int | Array, rules: Rules
) -> Array:
    """Whether a running beam could still beat a finished one, (B, 1).

    `early_stopping="never"` assumes the length that favours it most; otherwise its present one.
    """
    length = jnp.where(rules.is_hopeful, limit, made).astype(jnp.float32)
    best = running.scores[:, :1] / length**rules.length_penalty
    worst = finished.scores.min(1, keepdims=True)
    return (best > jnp.where(finished.lengths > 0, worst, NEG_INF)).any(1, keepdims=True)


def run(
    graph: Any, state: Any, prompts: Prompts, history_RS: Array, mask_RS: Array,
    rules: Rules,
) -> tuple[Array, Array]:  # fmt: skip
    """All of a search as one program: its best rows, and the highest scores at its start."""
    model = nnx.merge(graph, state)
    found = prefill_prompts(model, prompts, None, history_RS.shape[1])
    found = copy_rows(*found, rules.num_beams, model.mesh)
    search, best = _open(*found, history_RS, mask_RS, prompts.length, rules, model.mesh)
    found = _loop(graph, state, search, rules).finished.ids
    return found[:, : rules.num_return_sequences].reshape(-1, found.shape[2]), best


class _Search(NamedTuple):
    """The state of a search; `parents` (B, W) are the beams that were continued."""

    cache: KVCache
    mask: Array
    running: Beams
    finished: Beams
    is_open: Array
    parents: Array
    made: int | Array
    prompt: Array
    keep_going: Array


def _start(model: "FlaxOPTForCausalLM", request: Request) -> tuple[Any, Any, _Search, Rules]:
    """Reads the prompts and chooses the first tokens; the model comes back in its two parts."""
    (graph, state), W = nnx.split(model), request.settings.num_beams
    rules = sampling.request_rules(model, request)
    found = read_prompts(model, (graph, state), request, request.slots, W)
    tokens, prompt = allocate_tokens(request, request.slots, W), np.int32(request.ids.shape[1])
    search, best = _open(*found, *tokens, prompt, rules, model.mesh)
    check_logits(np.asarray(best))
    return graph, state, search, rules


@partial(Program, static_argnames="mesh", donate_argnames="cache")
def _open(
    logits_RV: Array,
    cache: KVCache,
    history_RS: Array,
    mask_RS: Array,
    prompt: Array,
    rules: Rules,
    mesh: Mesh | None,
) -> tuple[_Search, Array]:
    """The beams with their first token, and the highest score of each row."""
    (R, S), W = history_RS.shape, rules.num_beams
    B = R // W
    empty = Beams(
        history_RS.reshape(B, W, S), jnp.full((B, W), NEG_INF), jnp.zeros((B, W), jnp.int32)
    )
    # All beams start alike: only the first may be continued, or the same text would come W times.
    running = empty._replace(scores=empty.scores.at[:, 0].set(0))
    open_all = jnp.ones((B, 1), bool)
    parents = jnp.zeros((B, W), jnp.int32)
    search = _Search(cache, mask_RS, running, empty, open_all, parents, 0, prompt, jnp.array(True))
    search, scores = _choose(search, logits_RV, rules)
    return search, replicate(scores.max(-1), mesh)


def _choose(search: _Search, logits: Array, rules: Rules) -> tuple[_Search, Array]:
    """Gives every beam its next token; returns the constrained scores too."""
    made, (B, W, S) = search.made, search.running.ids.shape
    end, limit = search.prompt + made, rules.new_tokens
    mask = search.mask & (jnp.arange(S) < end)
    scores = jax.nn.log_softmax(loop.mask_vocabulary(logits, rules.vocabulary), -1)
    history = search.running.ids.reshape(B * W, S)
    is_last = made + 1 == limit
    scores = filters.process_logits(sampling, scores, history, mask, end, made, rules, is_last)
    grown, parents = extend_beams(search.running, scores, end, made, rules)
    last = lax.dynamic_index_in_dim(grown.ids, end, 2, keepdims=False)
    ends = rules.ends[last] | is_last
    finished = finish_beams(search.finished, grown, ends, made, search.is_open, rules)
    running, index = grown._replace(scores=grown.scores + ends * NEG_INF).best(W)
    is_open = search.is_open & can_improve(running, finished, made + 1, limit, rules)
    keep_going = ~ends.all() & is_open.any()
    keep_going &= ~(rules.is_full_enough & (finished.lengths > 0).all())
    parents = jnp.take_along_axis(parents, index, 1)
    search = search._replace(
        running=running, finished=finished, is_open=is_open, parents=parents, made=made + 1,
        keep_going=keep_going,
    )  # fmt: skip
    return search, scores


@partial(Program, static_argnames="graph", donate_argnames="search")
def _loop(graph: Any, state: Any, search: _Search, rules: Rules) -> _Search:
    """Tokens until no beam can become one of the best."""
    model = nnx.merge(graph, state)

    def advance(search: _Search) -> _Search:
        slot = search.prompt + search.made - 1
        last = lax.dynamic_index_in_dim(search.running.ids, slot, 2, keepdims=False)
        cache = search.cache.regroup(search.parents, model.mesh)
        logits, cache = loop.decode_step(model, last.reshape(-1), cache)
        return _choose(search._replace(cache=cache), logits, rules)[0]

    search = lax.while_loop(lambda search: search.keep_going, advance, search)
    finished = Beams(*(replicate(values, model.mesh) for values in search.finished))
    return search._replace(finished=finished)
