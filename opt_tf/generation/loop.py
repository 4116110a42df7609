"""Generation: one prefill, then one decode step per token, compiled by XLA.

`stream` runs the step once per token, `generate` runs the same step in a loop on the device. The
prompts are read by a program of their own: another kind of search does not compile it again. They
are padded on the right to a length out of a few, so that another prompt rarely needs another
program; what lies behind a prompt is never looked at and then overwritten.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from opt_core.generation import filters
from opt_core.generation.request import Request, check_logits, pair_seed
from opt_core.generation.rules import BANNED, Rules
from opt_tf.cache import KVCache
from opt_tf.compilation import generation_program, program_inputs, traced
from opt_tf.generation import sampling
from opt_tf.generation.prefill import copy_rows, prefill, prefill_prompts, read_prompts
from opt_tf.inputs import full_mask
from opt_tf.linear import sizes

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


class _State(NamedTuple):
    """The state that goes from one token to the next.

    Attributes:
        made: Tokens generated so far, scalar.
        token: (R,) the newest of them.
        ended: bool (R,), rows that have ended.
        history: (R, S) prompt and generated tokens.
        keys: The cache's.
        values: The cache's.
    """

    made: tf.Tensor
    token: tf.Tensor
    ended: tf.Tensor
    history: tf.Tensor
    keys: tuple[tf.Tensor, ...]
    values: tuple[tf.Tensor, ...]


def decode_step(
    model: "TFOPTForCausalLM", ids_B: tf.Tensor, cache: KVCache
) -> tuple[tf.Tensor, KVCache]:
    """Reads one more token per row.

    Returns:
        Logits (B, V) after it, and the cache that holds it.
    """
    length = tf.convert_to_tensor(cache.length)
    logits, keys, values = traced(model, _decode_step)(
        ids_B, cache.keys, cache.values, length, cache.mask
    )
    return logits, replace(cache, keys=keys, values=values, length=length + 1)


def _decode_step(
    model: "TFOPTForCausalLM", ids_B: tf.Tensor, *parts: Any
) -> tuple[tf.Tensor, tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
    cache = KVCache(*parts)
    logits, cache = prefill(model, ids_B[:, None], full_mask(None, 1, cache), cache)
    return logits, cache.keys, cache.values


def stream(model: "TFOPTForCausalLM", request: Request) -> Iterator[tf.Tensor]:
    """Chooses, yields and decodes until every row has ended.

    Args:
        model: The language model.
        request: What to generate; not by beam search, which is certain of no token before the
            end.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended.
    """
    inputs, state = _start(model, request)
    trackers = request.stop_trackers(sizes(state.token)[0])
    can_end = bool(request.settings.eos_ids or trackers)
    for made in range(1, request.new_tokens + 1):
        if trackers:
            tokens = state.token.numpy().tolist()
            hits = [t.push(i) for t, i in zip(trackers, tokens, strict=True)]
            state = state._replace(ended=state.ended | tf.constant(hits))
        yield state.token
        if made == request.new_tokens or (can_end and bool(tf.reduce_all(state.ended))):
            return
        state = generation_program(model, request, _step)(inputs, state)


def generate(model: "TFOPTForCausalLM", request: Request) -> tf.Tensor:
    """The prompts and all that `stream` yields after them."""
    if request.settings.stops:  # texts are watched on the host
        return tf.constant(request.join(stream(model, request)))
    inputs, state = _start(model, request)
    if request.new_tokens > 1:
        state = generation_program(model, request, _loop)(inputs, state)
    return state.history[:, : request.ids.shape[1] + int(state.made)]


def mask_vocabulary(logits_BV: tf.Tensor, vocabulary: int | tf.Tensor) -> tf.Tensor:
    """Logits in float32, ids from `vocabulary` on banned."""
    known = tf.range(sizes(logits_BV)[1]) < vocabulary
    return tf.where(known, tf.cast(logits_BV, tf.float32), BANNED)


def run(
    model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """All of a generation: the rows (R, S), tokens made, and the largest logits at its start."""
    found = prefill_prompts(model, inputs, rules.chunk, sizes(inputs["history"])[1])
    logits, cache = copy_rows(*found, rules.num_return_sequences)
    state, best = _open(model, rules, inputs, logits, cache.keys, cache.values)
    state = _loop(model, rules, inputs, state)
    return state.history, state.made, best


def trace(
    model: "TFOPTForCausalLM",
    request: Request,
    run: Callable[..., tuple[tf.Tensor, tf.Tensor, tf.Tensor]],
    ids_BT: tf.Tensor,
    mask_BT: tf.Tensor | None,
    seed: tf.Tensor | int | None,
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """A generation as a part of the program that is being traced.

    Args:
        model: The language model.
        request: What to generate; its prompts are of the greatest length there may be.
        run: This module's `run`, or that of `beam`.
        ids_BT: The prompts.
        mask_BT: 0 at padding; None: nothing is padded.
        seed: Of sampling, one number or two; None: another one at each run.

    Returns:
        Rows (R, S), how many tokens were made, and the largest logits at the start.
    """
    prompt, slots = tf.shape(ids_BT)[1], request.ids.shape[1] + request.new_tokens
    # Slots of a number that is known, so that the loop's shapes are.
    behind = [[0, 0], [0, slots - prompt]]
    mask_BT = tf.ones_like(ids_BT, tf.bool) if mask_BT is None else tf.cast(mask_BT, tf.bool)
    history = tf.pad(ids_BT, behind, constant_values=request.pad)
    if seed is None:
        seed = tf.random.uniform((), 0, 2**63 - 1, tf.int64) if request.settings.do_sample else 0
    number = tf.cast(seed, tf.int64)
    if number.shape.rank == 1:
        number = pair_seed(*tf.unstack(number, 2))
    inputs = {
        "ids": ids_BT,
        "history": tf.reshape(history, (-1, slots)),
        "mask": tf.reshape(tf.pad(mask_BT, behind, constant_values=True), (-1, slots)),
        "prompt": prompt,
        "seed": number,
    }
    return run(model, sampling.request_rules(model, request), inputs)


def _start(model: "TFOPTForCausalLM", request: Request) -> tuple[dict[str, Any], _State]:
    """Reads the prompts and chooses the first token; the inputs of the programs that follow."""
    inputs, copies = program_inputs(request, request.slots), request.settings.num_return_sequences
    logits, cache = read_prompts(model, request, request.slots, copies)
    program = generation_program(model, request, _open)
    state, best = program(inputs, logits, cache.keys, cache.values)
    check_logits(best.numpy())
    return inputs, state


def _open(
    model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], logits_RV: tf.Tensor,
    keys: Any, values: Any,
) -> tuple[_State, tf.Tensor]:  # fmt: skip
    """The first token of each row, and the largest logit it was chosen by."""
    copies = rules.num_return_sequences
    history = tf.repeat(inputs["history"], copies, 0) if copies > 1 else inputs["history"]
    no_row = tf.zeros(tf.shape(history)[0], tf.bool)
    state = _State(tf.constant(0), no_row, no_row, history, keys, values)
    logits = _constrained(logits_RV, rules, inputs, state, _mask(rules, inputs), 0)
    return _write(logits, rules, inputs, state), tf.reduce_max(logits, -1)


def _step(model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], state: _State) -> _State:
    """Reads the newest token and chooses the next one."""
    mask = _mask(rules, inputs)
    length = inputs["prompt"] + state.made - 1
    logits, cache = decode_step(model, state.token, KVCache(state.keys, state.values, length, mask))
    state = state._replace(keys=cache.keys, values=cache.values)
    logits = _constrained(logits, rules, inputs, state, mask, state.made)
    return _write(logits, rules, inputs, state)


def _loop(model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], state: _State) -> _State:
    """Steps until all rows have ended or are full; the state without a cache."""

    def keep_going(*state: Any) -> tf.Tensor:
        state = _State(*state)
        is_open = state.made < rules.new_tokens
        return is_open & ~tf.reduce_all(state.ended)

    def step(*state: Any) -> _State:
        state = _with(_State(*state), KVCache.unsqueezed)
        return _with(_step(model, rules, inputs, state), KVCache.squeezed)

    state = _State(*tf.while_loop(keep_going, step, _with(state, KVCache.squeezed)))
    return state._replace(keys=(), values=())


def _mask(rules: Rules, inputs: dict[str, Any]) -> tf.Tensor:
    """The mask of all rows."""
    copies = rules.num_return_sequences
    return tf.repeat(inputs["mask"], copies, 0) if copies > 1 else inputs["mask"]


def _with(state: _State, change: Callable[[KVCache], KVCache]) -> _State:
    """The state with its cache changed."""
    cache = change(KVCache(state.keys, state.values))
    return state._replace(keys=cache.keys, values=cache.values)


def _constrained(
    logits: tf.Tensor, rules: Rules, inputs: dict[str, Any], state: _State, mask: tf.Tensor,
    made: int | tf.Tensor,
) -> tf.Tensor:  # fmt: skip
    end = inputs["prompt"] + made
    mask = mask & (tf.range(sizes(mask)[1]) < end)
    logits = mask_vocabulary(logits, rules.vocabulary)
    is_last = made + 1 == rules.new_tokens
    return filters.process_logits(sampling, logits, state.history, mask, end, made, rules, is_last)


def _write(logits: tf.Tensor, rules: Rules, inputs: dict[str, Any], state: _State) -> _State:
    """Chooses a token for each row that has not ended, and writes it down."""
    seed = tf.stack([inputs["seed"], tf.cast(state.made, tf.int64)])
    token = filters.select_tokens(sampling, logits, rules, seed)
    token = tf.where(state.ended, rules.pad, token)
    ended = state.ended | tf.gather(rules.ends, token)
    is_here = tf.range(sizes(state.history)[1]) == inputs["prompt"] + state.made
    history = tf.where(is_here, token[:, None], state.history)
    return state._replace(made=state.made + 1, token=token, ended=ended, history=history)
