"""Generation: one prefill, then one decode step per token, each compiled once.

`stream` runs the step once per token, `generate` runs the same step in a loop on the device. The
prompts are read by a program of their own: another kind of search does not compile it again.
Programs depend on the number of rows and on lengths rounded up to a bucket, not on the prompt, the
seed or the numbers of the settings.
"""

from collections.abc import Callable, Iterator
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
from opt_core.generation.rules import BANNED, Rules
from opt_flax.cache import KVCache
from opt_flax.compilation import Prompts, read_prompts
from opt_flax.generation import sampling
from opt_flax.generation.prefill import copy_rows, prefill_prompts
from opt_flax.programs import Program
from opt_flax.sharding import replicate

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


class _Rows(NamedTuple):
    """The rows being generated.

    Attributes:
        history: (R, S) prompts, then what was generated, then `pad`.
        mask: bool (R, S), False at the prompts' padding.
        ended: bool (R,).
        token: (R,) the newest tokens.
        cache: Keys and values of all tokens but the newest.
        made: Tokens generated.
        prompt: Slots of the prompts.
    """

    history: Array
    mask: Array
    ended: Array
    token: Array
    cache: KVCache
    made: int | Array
    prompt: Array


def decode_step(model: "FlaxOPTForCausalLM", ids_B: Array, cache: KVCache) -> tuple[Array, KVCache]:
    """Reads one more token per row.

    Returns:
        Logits (B, V) after it, and the cache that holds it.
    """
    decoder = model.get_decoder()
    embeds = decoder.embed_tokens(ids_B[:, None])
    out = decoder(embeds, None, cache.mask, cache, deterministic=True)
    assert out.last_hidden_state is not None
    assert out.past_key_values is not None
    return model.compute_logits(out.last_hidden_state[:, 0]), out.past_key_values


def stream(model: "FlaxOPTForCausalLM", request: Request) -> Iterator[Array]:
    """Chooses, yields and decodes until every row has ended.

    Args:
        model: The language model.
        request: What to generate; not by beam search, which is certain of no token before the
            end.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended.
    """
    graph, state, rows, rules = _start(model, request)
    trackers = request.stop_trackers(len(rows.ended))
    can_end = bool(request.settings.eos_ids or trackers)
    for made in range(1, request.new_tokens + 1):
        if trackers:
            hits = [t.push(i) for t, i in zip(trackers, rows.token.tolist(), strict=True)]
            rows = rows._replace(ended=rows.ended | np.array(hits))
        yield rows.token
        if made == request.new_tokens or (can_end and bool(rows.ended.all())):
            return
        rows = _step(graph, state, rows._replace(token=rows.token.copy()), rules)


def generate(model: "FlaxOPTForCausalLM", request: Request) -> Array:
    """The prompts and all that `stream` yields after them."""
    if request.settings.stops:  # texts are watched on the host
        return jnp.asarray(request.join(stream(model, request)))
    graph, state, rows, rules = _start(model, request)
    if request.new_tokens > 1 or model.mesh is not None:  # which brings the rows together, too
        rows = _loop(graph, state, rows, rules)
    length = request.ids.shape[1] + int(rows.made)
    return jnp.asarray(np.asarray(rows.history)[:, :length])


def mask_vocabulary(logits_BV: Array, vocabulary: int | Array) -> Array:
    """Logits in float32, ids from `vocabulary` on banned."""
    known = jnp.arange(logits_BV.shape[1]) < vocabulary
    return jnp.where(known, logits_BV.astype(jnp.float32), BANNED)


def run(
    graph: Any, state: Any, prompts: Prompts, history_RS: Array, mask_RS: Array,
    rules: Rules,
) -> tuple[Array, Array]:  # fmt: skip
    """All of a generation as one program: the rows (R, S), and the highest logits at its start."""
    model = nnx.merge(graph, state)
    found = prefill_prompts(model, prompts, None, history_RS.shape[1])
    found = copy_rows(*found, rules.num_return_sequences, model.mesh)
    rows, best = _open(*found, history_RS, mask_RS, prompts.length, rules, model.mesh)
    return _loop(graph, state, rows, rules).history, best


def trace(
    model: "FlaxOPTForCausalLM",
    request: Request,
    run: Callable[..., tuple[Array, Array]],
    ids_BT: Array,
    mask_BT: Array | None,
    seed: int | Array | None,
) -> tuple[Array, Array]:
    """A generation as a part of the program that is being traced.

    Args:
        model: The language model.
        request: What to generate; its prompts are of the greatest length there may be.
        run: This module's `run`, or that of `beam`.
        ids_BT: The prompts.
        mask_BT: 0 at padding; None: nothing is padded.
        seed: Of sampling, or a key; None: the request's.

    Returns:
        Rows (R, S), and the largest logits at the start.
    """
    graph, state = nnx.split(model)
    settings, T, longest = request.settings, ids_BT.shape[1], request.ids.shape[1]
    copies = settings.num_beams if settings.is_beam_search else settings.num_return_sequences
    mask_BT = jnp.ones(ids_BT.shape, bool) if mask_BT is None else mask_BT != 0
    ids, real = (
        jnp.pad(values, ((0, 0), (0, longest - T)), constant_values=fill)
        for values, fill in ((ids_BT, request.pad), (mask_BT, True))
    )
    free = ((0, 0), (0, request.new_tokens))
    history = jnp.repeat(jnp.pad(ids, free, constant_values=request.pad), copies, 0)
    known = jnp.repeat(jnp.pad(real, free, constant_values=True), copies, 0)
    prompts = Prompts(ids, real, jnp.asarray(T, jnp.int32), None)
    key = None if seed is None else sampling.drawn_key(seed)
    rules = sampling.request_rules(model, request, key)
    return run(graph, state, prompts, history, known, rules)


def _start(model: "FlaxOPTForCausalLM", request: Request) -> tuple[Any, Any, _Rows, Rules]:
    """Reads the prompts and chooses the first token; the model comes back in its two parts."""
    (graph, state), copies = nnx.split(model), request.settings.num_return_sequences
    rules = sampling.request_rules(model, request)
    found = read_prompts(model, (graph, state), request, request.slots, copies)
    tokens, prompt = allocate_tokens(request, request.slots, copies), np.int32(request.ids.shape[1])
    rows, best = _open(*found, *tokens, prompt, rules, model.mesh)
    check_logits(np.asarray(best))
    return graph, state, rows, rules


@partial(Program, static_argnames="mesh", donate_argnames="cache")
def _open(
    logits_RV: Array,
    cache: KVCache,
    history_RS: Array,
    mask_RS: Array,
    prompt: Array,
    rules: Rules,
    mesh: Mesh | None,
) -> tuple[_Rows, Array]:
    """The rows with their first token, and the highest logit of each."""
    R = history_RS.shape[0]
    none = jnp.zeros(R, jnp.int32)
    rows = _Rows(history_RS, mask_RS, jnp.zeros(R, bool), none, cache, 0, prompt)
    rows, scores = _choose(rows, logits_RV, rules, mesh)
    return rows, replicate(scores.max(-1), mesh)


def _choose(rows: _Rows, logits: Array, rules: Rules, mesh: Mesh | None) -> tuple[_Rows, Array]:
    """Gives every row its next token; returns the constrained logits too."""
    end = rows.prompt + rows.made
    mask = rows.mask & (jnp.arange(rows.mask.shape[1]) < end)
    scores = mask_vocabulary(logits, rules.vocabulary)
    is_last = rows.made + 1 == rules.new_tokens
    scores = filters.process_logits(
        sampling, scores, rows.history, mask, end, rows.made, rules, is_last
    )
    token = filters.select_tokens(sampling, scores, rules, jax.random.fold_in(rules.key, rows.made))
    token = replicate(jnp.where(rows.ended, rules.pad, token), mesh)
    ended = rows.ended | rules.ends[token]
    history = lax.dynamic_update_slice(rows.history, token[:, None], (0, end))
    rows = rows._replace(history=history, ended=ended, token=token, made=rows.made + 1)
    return rows, scores


def _advance(model: Any, rows: _Rows, rules: Rules) -> _Rows:
    """Reads the newest token of every row and chooses the next."""
    logits, cache = decode_step(model, rows.token, rows.cache)
    return _choose(rows._replace(cache=cache), logits, rules, model.mesh)[0]


@partial(Program, static_argnames="graph", donate_argnames="rows")
def _step(graph: Any, state: Any, rows: _Rows, rules: Rules) -> _Rows:
    """One more token per row."""
    return _advance(nnx.merge(graph, state), rows, rules)


@partial(Program, static_argnames="graph", donate_argnames="rows")
def _loop(graph: Any, state: Any, rows: _Rows, rules: Rules) -> _Rows:
    """Tokens until there are enough of them or every row has ended."""
    model = nnx.merge(graph, state)

    def keep_going(rows: _Rows) -> Array:
        return (rows.made < rules.new_tokens) & ~rows.ended.all()

    def advance(rows: _Rows) -> _Rows:
        rows = _advance(model, rows._replace(cache=rows.cache.unsqueezed()), rules)
        return rows._replace(cache=rows.cache.squeezed())

    rows = lax.while_loop(keep_going, advance, rows._replace(cache=rows.cache.squeezed()))
    history = replicate(rows.history, model.mesh)
    return rows._replace(history=history, cache=rows.cache.unsqueezed())
