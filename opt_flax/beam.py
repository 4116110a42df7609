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

from opt_core.errors import GenerationError
from opt_flax import generation, sampling
from opt_flax.cache import KVCache
from opt_flax.compilation import TracedSettings
from opt_flax.prefill import prefill_prompts
from opt_flax.sharding import replicate

if TYPE_CHECKING:
    from opt_flax.generation import Request
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


def search(model: "FlaxOPTForCausalLM", request: "Request") -> Array:
    """Finds likely continuations by keeping the W best of them at every step.

    Args:
        model: The language model.
        request: A checked request with `num_beams` > 1.

    Returns:
        (B * num_return_sequences, T + new) ids, each prompt's best first.

    Raises:
        GenerationError: Stop strings were asked for.
    """
    settings = request.settings
    if settings.stops:
        raise GenerationError("stop_strings with num_beams > 1 is not supported; use eos_token_id")
    (B, prompt), W = request.ids.shape, settings.num_beams
    graph, state = nnx.split(model)
    history, real = generation.allocate_tokens(request, W)
    ids, mask = generation.bucketed(request)
    traced = TracedSettings.of(settings)
    limits = _Limits(traced, np.int32(prompt), request.new_tokens, request.vocabulary)
    search, best = _first(
        graph, state, ids, mask, history, real, limits, request.past, request.block
    )
    generation.check_logits(best)
    finished = _loop(graph, state, search, limits).finished
    count = settings.num_return_sequences
    ids, lengths = (np.asarray(x)[:, :count] for x in (finished.ids, finished.lengths))
    return jnp.asarray(ids[:, :, : prompt + lengths.max()].reshape(B * count, -1))


def extend_beams(
    running: Beams, scores_RV: Array, end: Array, made: int | Array, settings: Any
) -> tuple[Beams, Array]:
    """The best continuations of the running beams by one token.

    There are enough of them for W to remain should all others end.

    Args:
        running: The beams so far.
        scores_RV: Log-probabilities of the next token of each of the B * W beams.
        end: Slot of the next token.
        made: Tokens each beam has.
        settings: Number of beams and of EOS ids.

    Returns:
        The grown beams, (B, C), and the number of the beam each came from, (B, C).
    """
    B, W = running.scores.shape
    V = scores_RV.shape[1]
    totals = (scores_RV.reshape(B, W, V) + running.scores[..., None]).reshape(B, W * V)
    count = min(max(2, 1 + len(settings.eos_ids)) * W, W * V)
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
    settings: Any,
) -> Beams:
    """The W best finished beams after some of the grown ones ended.

    Only a beam among the W best continuations may finish; the others are reserves.
    """
    W = finished.scores.shape[1]
    ends_BC = ends_BC & (jnp.arange(ends_BC.shape[1]) < W)
    closed = ~is_open
    if settings.early_stopping is True:
        closed = closed | (finished.lengths > 0).all(1, keepdims=True)
    scores = grown.scores / jnp.float32(made + 1) ** settings.length_penalty
    scores = scores + closed * NEG_INF + ~ends_BC * NEG_INF
    grown = Beams(grown.ids, scores, grown.lengths * ends_BC)
    both = Beams(*(jnp.concatenate(pair, 1) for pair in zip(finished, grown, strict=True)))
    return both.best(W)[0]


def can_improve(
    running: Beams, finished: Beams, made: int | Array, limit: int | Array, settings: Any
) -> Array:
    """Whether a running beam could still beat a finished one, (B, 1).

    `early_stopping="never"` assumes the length that favours it most; otherwise its present one.
    """
    length = jnp.float32(made)
    if settings.early_stopping == "never":
        length = jnp.where(settings.length_penalty > 0, jnp.float32(limit), length)
    best = running.scores[:, :1] / length**settings.length_penalty
    worst = finished.scores.min(1, keepdims=True)
    return (best > jnp.where(finished.lengths > 0, worst, NEG_INF)).any(1, keepdims=True)


class _Limits(NamedTuple):
    """What a program takes as arguments besides the model and the beams."""

    settings: Any
    prompt: Any
    limit: int
    vocabulary: int


class _Search(NamedTuple):
    """The state of a search; `parents` (B, W) are the beams that were continued."""

    cache: KVCache
    real: Array
    running: Beams
    finished: Beams
    is_open: Array
    parents: Array
    made: int | Array
    keep_going: Array


@partial(jax.jit, static_argnames=("graph", "block"))
def _first(
    graph: Any,
    state: Any,
    ids_BT: Array,
    mask_BT: Array | None,
    history_RS: Array,
    real_RS: Array,
    limits: _Limits,
    past: KVCache | None = None,
    block: int | None = None,
) -> tuple[_Search, Array]:
    """The beams with their first token, and the highest score of each row."""
    model = nnx.merge(graph, state)
    (B, _), (R, S) = ids_BT.shape, history_RS.shape
    W = R // B
    logits, cache = prefill_prompts(model, ids_BT, mask_BT, real_RS, limits.prompt, past, block)
    empty = Beams(
        history_RS.reshape(B, W, S), jnp.full((B, W), NEG_INF), jnp.zeros((B, W), jnp.int32)
    )
    # All beams start alike: only the first may be continued, or the same text would come W times.
    running = empty._replace(scores=empty.scores.at[:, 0].set(0))
    open_all = jnp.ones((B, 1), bool)
    parents = jnp.zeros((B, W), jnp.int32)
    search = _Search(cache, real_RS, running, empty, open_all, parents, 0, jnp.array(True))
    search, scores = _continue(search, logits, limits)
    return search, replicate(scores.max(-1), model.mesh)


def _continue(search: _Search, logits: Array, limits: _Limits) -> tuple[_Search, Array]:
    """Gives every beam its next token; returns the constrained scores too."""
    settings, made, (B, W, S) = limits.settings, search.made, search.running.ids.shape
    end = limits.prompt + made
    real = search.real & (jnp.arange(S) < end)
    scores = jax.nn.log_softmax(generation.mask_vocabulary(logits, limits.vocabulary), -1)
    history = search.running.ids.reshape(B * W, S)
    scores = sampling.process_logits(scores, history, real, end, made, settings)
    grown, parents = extend_beams(search.running, scores, end, made, settings)
    last = lax.dynamic_index_in_dim(grown.ids, end, 2, keepdims=False)
    ends = jnp.isin(last, jnp.array(settings.eos_ids, jnp.int32)) | (made + 1 == limits.limit)
    finished = finish_beams(search.finished, grown, ends, made, search.is_open, settings)
    running, index = grown._replace(scores=grown.scores + ends * NEG_INF).best(W)
    is_open = search.is_open & can_improve(running, finished, made + 1, limits.limit, settings)
    keep_going = ~ends.all() & is_open.any()
    if settings.early_stopping is True:
        keep_going &= ~(finished.lengths > 0).all()
    parents = jnp.take_along_axis(parents, index, 1)
    search = _Search(
        search.cache, search.real, running, finished, is_open, parents, made + 1, keep_going
    )
    return search, scores


@partial(jax.jit, static_argnames="graph", donate_argnames="search")
def _loop(graph: Any, state: Any, search: _Search, limits: _Limits) -> _Search:
    """Tokens until no beam can become one of the best."""
    model = nnx.merge(graph, state)

    def advance(search: _Search) -> _Search:
        slot = limits.prompt + search.made - 1
        last = lax.dynamic_index_in_dim(search.running.ids, slot, 2, keepdims=False)
        cache = search.cache.regroup(search.parents, model.mesh)
        logits, cache = generation.decode_step(model, last.reshape(-1), cache)
        return _continue(search._replace(cache=cache), logits, limits)[0]

    search = lax.while_loop(lambda search: search.keep_going, advance, search)
    finished = Beams(*(replicate(values, model.mesh) for values in search.finished))
    return search._replace(finished=finished)
