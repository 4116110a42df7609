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

from opt_core.generation import filters
from opt_core.generation.request import Request, allocate_tokens, check_logits
from opt_core.generation.rules import Rules
from opt_flax import generation, sampling
from opt_flax.cache import KVCache
from opt_flax.compilation import Prompts, program_inputs
from opt_flax.prefill import prefill_prompts
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
    (B, prompt), slots = request.ids.shape, request.slots
    graph, state = nnx.split(model)
    rules = sampling.request_rules(model, request)
    history, mask = allocate_tokens(request, slots, request.settings.num_beams)
    prompts = program_inputs(request, slots)
    search, best = _start(graph, state, prompts, history, mask, rules, request.chunk)
    check_logits(np.asarray(best))
    finished = _loop(graph, state, search, rules).finished
    count = request.settings.num_return_sequences
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
    closed = ~is_open
    if rules.early_stopping is True:
        closed = closed | (finished.lengths > 0).all(1, keepdims=True)
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
    length = jnp.float32(made)
    if rules.early_stopping == "never":
        length = jnp.where(rules.length_penalty > 0, jnp.float32(limit), length)
    best = running.scores[:, :1] / length**rules.length_penalty
    worst = finished.scores.min(1, keepdims=True)
    return (best > jnp.where(finished.lengths > 0, worst, NEG_INF)).any(1, keepdims=True)


def run(
    graph: Any, state: Any, prompts: Prompts, history_RS: Array, mask_RS: Array,
    rules: Rules,
) -> tuple[Array, Array]:  # fmt: skip
    """All of a search as one program: its best rows, and the highest scores at its start."""
    search, best = _start(graph, state, prompts, history_RS, mask_RS, rules)
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


@partial(jax.jit, static_argnames=("graph", "chunk"))
def _start(
    graph: Any,
    state: Any,
    prompts: Prompts,
    history_RS: Array,
    mask_RS: Array,
    rules: Rules,
    chunk: int | None = None,
) -> tuple[_Search, Array]:
    """The beams with their first token, and the highest score of each row."""
    model = nnx.merge(graph, state)
    B, (R, S) = prompts.ids.shape[0], history_RS.shape
    W = R // B
    logits, cache = prefill_prompts(model, prompts, chunk, S, W)
    empty = Beams(
        history_RS.reshape(B, W, S), jnp.full((B, W), NEG_INF), jnp.zeros((B, W), jnp.int32)
    )
    # All beams start alike: only the first may be continued, or the same text would come W times.
    running = empty._replace(scores=empty.scores.at[:, 0].set(0))
    open_all = jnp.ones((B, 1), bool)
    parents = jnp.zeros((B, W), jnp.int32)
    search = _Search(
        cache, mask_RS, running, empty, open_all, parents, 0, prompts.length, jnp.array(True)
    )
    search, scores = _choose(search, logits, rules)
    return search, replicate(scores.max(-1), model.mesh)


def _choose(search: _Search, logits: Array, rules: Rules) -> tuple[_Search, Array]:
    """Gives every beam its next token; returns the constrained scores too."""
    made, (B, W, S) = search.made, search.running.ids.shape
    end, limit = search.prompt + made, rules.new_tokens
    mask = search.mask & (jnp.arange(S) < end)
    scores = jax.nn.log_softmax(generation.mask_vocabulary(logits, rules.vocabulary), -1)
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
    if rules.early_stopping is True:
        keep_going &= ~(finished.lengths > 0).all()
    parents = jnp.take_along_axis(parents, index, 1)
    search = search._replace(
        running=running, finished=finished, is_open=is_open, parents=parents, made=made + 1,
        keep_going=keep_going,
    )  # fmt: skip
    return search, scores


@partial(jax.jit, static_argnames="graph", donate_argnames="search")
def _loop(graph: Any, state: Any, search: _Search, rules: Rules) -> _Search:
    """Tokens until no beam can become one of the best."""
    model = nnx.merge(graph, state)

    def advance(search: _Search) -> _Search:
        slot = search.prompt + search.made - 1
        last = lax.dynamic_index_in_dim(search.running.ids, slot, 2, keepdims=False)
        cache = search.cache.regroup(search.parents, model.mesh)
        logits, cache = generation.decode_step(model, last.reshape(-1), cache)
        return _choose(search._replace(cache=cache), logits, rules)[0]

    search = lax.while_loop(lambda search: search.keep_going, advance, search)
    finished = Beams(*(replicate(values, model.mesh) for values in search.finished))
    return search._replace(finished=finished)
