"""Generation: one prefill, then one decode step per token, compiled by XLA.

`stream` runs the step once per token, `generate` runs the same step in a loop on the device. The
prompts are read by a program of their own: another kind of search does not compile it again. They
are padded on the right to a length out of a few, so that another prompt rarely needs another
program; what lies behind a prompt is never looked at and then overwritten.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from opt_core.generation import filters
from opt_core.generation.request import Request, check_logits, pair_seed
from opt_core.generation.rules import BANNED, Rules
from opt_tf import sampling
from opt_tf.cache import KVCache
from opt_tf.compilation import generation_program, program_inputs
from opt_tf.inputs import full_mask
from opt_tf.linear import sizes
from opt_tf.prefill import copy_rows, prefill, prefill_prompts, read_prompts

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


class _State(NamedTuple):
    """The state that goes from one token to the next.

    Attributes:
        made: Tokens generated so far, scalar.
        token: (R,) the newest of them.
        ended: bool (R,), rows that have ended.
        history: (R, S) prompt and generated tokens.
        logits: (R, V) after all tokens that the cache has.
        best: (R,) the largest logit that the first token was chosen by.
        keys: The cache's, with the newest token where there will be another.
        values: The cache's.
    """

    made: tf.Tensor
    token: tf.Tensor
    ended: tf.Tensor
    history: tf.Tensor
    logits: tf.Tensor
    best: tf.Tensor
    keys: tuple[tf.Tensor, ...]
    values: tuple[tf.Tensor, ...]


def decode_step(
    model: "TFOPTForCausalLM", ids_B: tf.Tensor, cache: KVCache
) -> tuple[tf.Tensor, KVCache]:
    """Reads one more token per row.

    Returns:
        Logits (B, V) after it, and the cache that holds it.
    """
    return prefill(model, ids_B[:, None], full_mask(None, 1, cache), cache)


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
    state = generation_program(model, request, _open)(inputs, state)
    check_logits(state.best.numpy())
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
    state = generation_program(model, request, _loop)(inputs, state)
    check_logits(state.best.numpy())
    return state.history[:, : request.ids.shape[1] + int(state.made)]


def mask_vocabulary(logits_BV: tf.Tensor, vocabulary: int | tf.Tensor) -> tf.Tensor:
    """Logits in float32, ids from `vocabulary` on banned."""
    known = tf.range(sizes(logits_BV)[1]) < vocabulary
    return tf.where(known, tf.cast(logits_BV, tf.float32), BANNED)


def run(
    model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """All of a generation: the rows (R, S), tokens made, and the largest logits at its start."""
    slots = sizes(inputs["history"])[1]
    logits, cache = prefill_prompts(model, inputs, rules.chunk, slots)
    copies = rules.num_return_sequences
    state = _begin(*copy_rows(logits, cache, copies), inputs["history"], copies)
    state = _loop(model, rules, inputs, state)
    return state.history, state.made, state.best


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
    """Reads the prompts; the inputs of the programs that follow."""
    inputs, copies = program_inputs(request, request.slots), request.settings.num_return_sequences
    found = read_prompts(model, request, request.slots, copies)
    return inputs, _begin(*found, inputs["history"], copies)


def _begin(logits_RV: tf.Tensor, cache: KVCache, history_BS: tf.Tensor, copies: int) -> _State:
    """Rows of which nothing is generated yet."""
    history = tf.repeat(history_BS, copies, 0) if copies > 1 else history_BS
    R = tf.shape(history)[0]
    ended, token, best = (tf.zeros(R, dtype) for dtype in (tf.bool, tf.int32, tf.float32))
    none = tf.constant(0)
    return _State(none, token, ended, history, logits_RV, best, cache.keys, cache.values)


def _open(model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], state: _State) -> _State:
    """The first token of every row."""
    return _choose(rules, inputs, state)


def _step(model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], state: _State) -> _State:
    """One more token per row."""
    return _choose(rules, inputs, _read(model, rules, inputs, state))


def _loop(model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], state: _State) -> _State:
    """Tokens until all rows have ended or are full; the state without a cache."""

    def keep_going(*state: Any) -> tf.Tensor:
        state = _State(*state)
        is_open = state.made < rules.new_tokens
        return is_open & ~tf.reduce_all(state.ended)

    def read(state: _State) -> _State:
        state = _read(model, rules, inputs, _with(state, KVCache.unsqueezed))
        return _with(state, KVCache.squeezed)

    def advance(*state: Any) -> _State:
        chosen = _choose(rules, inputs, _State(*state))
        return _State(*tf.cond(keep_going(*chosen), lambda: read(chosen), lambda: chosen))

    state = _State(*tf.while_loop(keep_going, advance, _with(state, KVCache.squeezed)))
    return state._replace(logits=(), keys=(), values=())


def _read(model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], state: _State) -> _State:
    """Reads the newest token of every row."""
    length = inputs["prompt"] + state.made - 1
    cache = KVCache(state.keys, state.values, length, _mask(rules, inputs))
    logits, cache = decode_step(model, state.token, cache)
    return state._replace(logits=logits, keys=cache.keys, values=cache.values)


def _mask(rules: Rules, inputs: dict[str, Any]) -> tf.Tensor:
    """The mask of all rows."""
    copies = rules.num_return_sequences
    return tf.repeat(inputs["mask"], copies, 0) if copies > 1 else inputs["mask"]


def _with(state: _State, change: Callable[[KVCache], KVCache]) -> _State:
    """The state with its cache changed."""
    cache = change(KVCache(state.keys, state.values))
    return state._replace(keys=cache.keys, values=cache.values)


def _choose(rules: Rules, inputs: dict[str, Any], state: _State) -> _State:
    """Gives every row its next token."""
    made, history, slots = state.made, state.history, tf.range(sizes(state.history)[1])
    end, is_first, is_last = inputs["prompt"] + made, made == 0, made + 1 == rules.new_tokens
    mask = _mask(rules, inputs) & (slots < end)
    rules = rules.replace(bias=tf.where(is_first, rules.begin_bias, rules.bias))
    scores = mask_vocabulary(state.logits, rules.vocabulary)
    scores = filters.process_logits(sampling, scores, history, mask, end, made, rules, is_last)
    seed = tf.stack([inputs["seed"], tf.cast(made, tf.int64)])
    token = filters.select_tokens(sampling, scores, rules, seed)
    token = tf.where(state.ended, rules.pad, token)
    return state._replace(
        made=made + 1, token=token, ended=state.ended | tf.gather(rules.ends, token),
        history=tf.where(slots == end, token[:, None], history),
        best=tf.where(is_first, tf.reduce_max(scores, -1), state.best),
    )  # fmt: skip
