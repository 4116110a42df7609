"""Generation: one prefill, then one decode step per token, compiled by XLA.

There are two programs per shape: the first token (prefill and choice), and the others. `generate`
runs the second one as a loop on the device, `stream` as one step at a time; both take the same
step. Prompts are padded on the right to a length out of a few, so that another prompt rarely needs
another program; what lies behind a prompt is never looked at and then overwritten.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.text.detokenizer import StopStringTracker
from opt_core.text.tokenizer import OPTTokenizer
from opt_tf import sampling
from opt_tf.cache import KVCache
from opt_tf.compilation import bucket, compiled, program_inputs
from opt_tf.inputs import check_inputs, check_prefix, full_mask
from opt_tf.linear import sizes
from opt_tf.prefill import prefill, prefill_prompts

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


@dataclass(frozen=True)
class Request:
    """A checked request for generation.

    Attributes:
        ids: (B, T) prompts.
        mask: bool (B, T), False at padding.
        settings: What to generate.
        new_tokens: Most tokens to add.
        vocabulary: Ids below this one may be generated.
        pad: Id that fills a finished row.
        past: A cache that holds the beginning of the prompts, or None.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    settings: GenerationConfig
    new_tokens: int
    vocabulary: int
    pad: int
    past: KVCache | None = None

    @property
    def block(self) -> int | None:
        """Tokens of the prompts to read at a time; None: all, with nothing before them."""
        T, chunk = self.ids.shape[1], self.settings.prefill_chunk_size
        if self.past is None:
            return None if chunk is None or chunk >= T else chunk
        return min(chunk or T, bucket(T - int(self.past.length)))


class _State(NamedTuple):
    """What goes from one token to the next.

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


def prepare(
    model: "TFOPTForCausalLM",
    input_ids: Any,
    attention_mask: Any,
    generation_config: GenerationConfig | None,
    seed: int,
    tokenizer: OPTTokenizer | None,
    past_key_values: KVCache | None = None,
    **overrides: Any,
) -> Request:
    """Checks prompts and settings against the model, before anything is computed.

    Raises:
        GenerationError: Padding on the right, a row without tokens, or a setting that cannot
            be honoured.
        InputError: Ids outside the vocabulary, or shapes that do not fit.
    """
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise GenerationError(f"seed: expected an integer in 0..2**63 - 1, received {seed!r}")
    config = model.config
    settings = model_settings(model, generation_config).replace(**overrides)
    tensor, given, _, _ = check_inputs(
        config, model.compute_dtype, input_ids, attention_mask, None, None, None
    )
    assert tensor is not None
    ids: NDArray[np.int32] = tensor.numpy()
    mask = np.ones(ids.shape, bool) if given is None else given.numpy()
    pads = _padding_ids(model, settings)
    texts = {config.bos_token_id, config.eos_token_id, *settings.eos_ids}
    if given is None and pads and pads[0] not in texts:
        # As transformers: an id that is nothing but padding is padding. Not so a BOS or EOS.
        mask = ids != pads[0]
    for row in np.flatnonzero(~mask[:, -1])[:1]:
        raise GenerationError(
            f"prompt {row} ends in padding; pad on the left: tokenizer(..., padding_side='left')"
        )
    settings.check(config, ids.shape[1], int(mask.sum(1).max()), tokenizer is not None)
    vocabulary = config.vocab_size
    if tokenizer is not None:
        # OPT's embedding has rows that no token has, never trained (transformers #18268).
        vocabulary = min(vocabulary, tokenizer.vocab_size)
    if past_key_values is not None:
        check_prefix(config, model.compute_dtype, past_key_values, ids, mask)
    new_tokens, pad = settings.new_tokens(ids.shape[1]), _filler(model, settings)
    return Request(ids, mask, settings, new_tokens, vocabulary, pad, past_key_values)


def model_settings(model: "TFOPTForCausalLM", config: GenerationConfig | None) -> GenerationConfig:
    """The caller's settings, special ids they leave open taken from the model's; or the model's."""
    if config is None:
        return model.generation_config
    if not isinstance(config, GenerationConfig):
        raise GenerationError(
            f"generation_config: expected a GenerationConfig, received {type(config).__name__}"
        )
    ids = ("eos_token_id", "pad_token_id", "bos_token_id")
    open_ids = {n: getattr(model.generation_config, n) for n in ids if getattr(config, n) is None}
    return config.replace(**open_ids)


def decode_step(
    model: "TFOPTForCausalLM", ids_B: tf.Tensor, cache: KVCache
) -> tuple[tf.Tensor, KVCache]:
    """Reads one more token per row.

    Returns:
        Logits (B, V) after it, and the cache that holds it.
    """
    return prefill(model, ids_B[:, None], full_mask(None, 1, cache), cache)


def stream(
    model: "TFOPTForCausalLM", request: Request, seed: int, tokenizer: OPTTokenizer | None
) -> Iterator[tf.Tensor]:
    """Chooses, yields and decodes until every row has ended.

    Args:
        model: The language model.
        request: What to generate, checked; not by beam search, which is certain of no token
            before the end.
        seed: Seed of sampling, 0 to 2**63 - 1.
        tokenizer: For stop strings.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended.
    """
    settings = request.settings
    inputs = program_inputs(request, *allocate_tokens(request), seed)
    state, best = compiled(model, request, _start)(inputs)
    check_logits(best.numpy())
    stops = settings.stops if tokenizer is not None else ()
    rows = range(sizes(state.token)[0])
    trackers = [StopStringTracker(tokenizer, stops) for _ in rows] if tokenizer and stops else []
    for made in range(1, request.new_tokens + 1):
        if trackers:
            tokens = state.token.numpy().tolist()
            hits = [t.push(i) for t, i in zip(trackers, tokens, strict=True)]
            state = state._replace(ended=state.ended | tf.constant(hits))
        yield state.token
        can_end = bool(settings.eos_ids or trackers)
        if made == request.new_tokens or (can_end and bool(tf.reduce_all(state.ended))):
            return
        state = compiled(model, request, _step)(inputs, state)


def allocate_tokens(request: Request) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """The prompts with room for new tokens behind them, and where tokens are real."""
    prompt = request.ids.shape[1]
    behind = (0, 0), (0, bucket(prompt + request.new_tokens) - prompt)
    ids = np.pad(request.ids, behind, constant_values=request.pad)
    return ids, np.pad(request.mask, behind, constant_values=True)


def check_logits(best_B: NDArray[np.float32]) -> None:
    """Refuses rows in which no token can come: all are banned, or the model gave NaN.

    Args:
        best_B: The largest logit of each row.
    """
    for row in np.flatnonzero(~np.isfinite(best_B))[:1]:
        reason = "the logits are NaN" if np.isnan(best_B[row]) else "every token is banned"
        raise GenerationError(f"row {row}: no token can be generated: {reason}")


def generate(
    model: "TFOPTForCausalLM", request: Request, seed: int, tokenizer: OPTTokenizer | None
) -> tf.Tensor:
    """The prompts and all that `stream` yields after them."""
    prompts = request.ids.repeat(request.settings.num_return_sequences, 0)
    if request.settings.stops:
        new = [token.numpy() for token in stream(model, request, seed, tokenizer)]
        return tf.constant(np.concatenate([prompts, np.stack(new, 1)], 1))
    inputs = program_inputs(request, *allocate_tokens(request), seed)
    state, best = compiled(model, request, _start)(inputs)
    check_logits(best.numpy())
    if request.new_tokens > 1:
        made, history = compiled(model, request, _loop)(inputs, state)
    else:
        made, history = state.made, state.history
    return history[:, : prompts.shape[1] + int(made)]


def mask_vocabulary(logits_BV: tf.Tensor, vocabulary: int) -> tf.Tensor:
    """Logits in float32, ids from `vocabulary` on banned."""
    logits_BV, V = tf.cast(logits_BV, tf.float32), sizes(logits_BV)[1]
    return sampling.ban_tokens(logits_BV, range(vocabulary, V)) if vocabulary < V else logits_BV


def _padding_ids(model: "TFOPTForCausalLM", settings: GenerationConfig) -> list[int]:
    """The padding ids that the settings and the model name, if any."""
    return [i for i in (settings.pad_token_id, model.config.pad_token_id) if i is not None]


def _filler(model: "TFOPTForCausalLM", settings: GenerationConfig) -> int:
    """Id that fills a finished row."""
    return [*_padding_ids(model, settings), *settings.eos_ids, 0][0]


def _run(
    model: "TFOPTForCausalLM", settings: Any, inputs: dict[str, Any]
) -> tuple[tf.Tensor, tf.Tensor]:
    """All of a generation as one program: the ids, and the largest logits at its start."""
    state, best = _start(model, settings, inputs)
    made, history = _loop(model, settings, inputs, state)
    return history[:, : inputs["prompt"] + made], best


def _start(
    model: "TFOPTForCausalLM", settings: Any, inputs: dict[str, Any]
) -> tuple[_State, tf.Tensor]:
    """The first token of each row, and the largest logit it was chosen by."""
    history, mask = inputs["history"], inputs["mask"]
    B = sizes(history)[0]
    logits, cache = prefill_prompts(model, settings, inputs)
    if settings.num_return_sequences > 1:
        rows = tf.repeat(tf.range(B), settings.num_return_sequences)
        history, mask, logits = (tf.gather(x, rows) for x in (history, mask, logits))
        cache = cache.select(rows)
    no_row = tf.zeros(tf.shape(history)[0], tf.bool)
    state = _State(tf.constant(0), no_row, no_row, history, cache.keys, cache.values)
    logits = _constrained(logits, settings, inputs, state, mask, 0)
    return _write(logits, settings, inputs, state), tf.reduce_max(logits, -1)


def _step(
    model: "TFOPTForCausalLM", settings: Any, inputs: dict[str, Any], state: _State
) -> _State:
    """Reads the newest token and chooses the next one."""
    mask = inputs["mask"]
    if settings.num_return_sequences > 1:
        mask = tf.repeat(mask, settings.num_return_sequences, 0)
    length = inputs["prompt"] + state.made - 1
    logits, cache = decode_step(model, state.token, KVCache(state.keys, state.values, length, mask))
    state = state._replace(keys=cache.keys, values=cache.values)
    logits = _constrained(logits, settings, inputs, state, mask, state.made)
    return _write(logits, settings, inputs, state)


def _loop(
    model: "TFOPTForCausalLM", settings: Any, inputs: dict[str, Any], state: _State
) -> tuple[tf.Tensor, tf.Tensor]:
    """Steps until all rows have ended or are full; how many tokens that made, and the history."""

    def keep_going(*state: Any) -> tf.Tensor:
        state = _State(*state)
        is_open = state.made < inputs["new_tokens"]
        return is_open & ~tf.reduce_all(state.ended) if settings.eos_ids else is_open

    def step(*state: Any) -> _State:
        state = _with(_State(*state), KVCache.unsqueezed)
        return _with(_step(model, settings, inputs, state), KVCache.squeezed)

    state = _State(*tf.while_loop(keep_going, step, _with(state, KVCache.squeezed)))
    return state.made, state.history


def _with(state: _State, change: Callable[[KVCache], KVCache]) -> _State:
    """The state with its cache changed."""
    cache = change(KVCache(state.keys, state.values))
    return state._replace(keys=cache.keys, values=cache.values)


def _constrained(
    logits: tf.Tensor, settings: Any, inputs: dict[str, Any], state: _State, mask: tf.Tensor,
    made: int | tf.Tensor,
) -> tf.Tensor:  # fmt: skip
    end = inputs["prompt"] + made
    is_real = mask & (tf.range(sizes(mask)[1]) < end)
    logits = mask_vocabulary(logits, settings.vocabulary)
    return sampling.process_logits(logits, state.history, is_real, end, made, settings)


def _write(logits: tf.Tensor, settings: Any, inputs: dict[str, Any], state: _State) -> _State:
    """Chooses a token for each row that has not ended, and writes it down."""
    seed = tf.stack([inputs["seed"], tf.cast(state.made, tf.int64)])
    token = sampling.select_tokens(logits, settings, seed)
    token = tf.where(state.ended, settings.pad, token)
    ended = state.ended
    if settings.eos_ids:
        ended |= tf.reduce_any(token[:, None] == tf.constant(settings.eos_ids), 1)
    is_here = tf.range(sizes(state.history)[1]) == inputs["prompt"] + state.made
    history = tf.where(is_here, token[:, None], state.history)
    return state._replace(made=state.made + 1, token=token, ended=ended, history=history)
