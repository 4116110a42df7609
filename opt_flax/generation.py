"""Generation: one prefill, then one decode step per token, each compiled once.

`stream` runs the step once per token, `generate` runs the same step in a loop on the device.
Programs depend on the number of rows and on lengths rounded up to a bucket, not on the prompt, the
seed or the numbers of the settings.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh
from numpy.typing import NDArray

from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.text.detokenizer import StopStringTracker
from opt_core.text.tokenizer import OPTTokenizer
from opt_flax import sampling
from opt_flax.cache import KVCache
from opt_flax.compilation import TracedSettings, bucket
from opt_flax.inputs import check_inputs, check_prefix
from opt_flax.prefill import prefill_prompts
from opt_flax.sharding import replicate

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


@dataclass(frozen=True)
class Request:
    """A checked request for generation.

    Attributes:
        ids: (B, T) prompts, int32.
        mask: bool (B, T), False at padding; None if nothing is padded.
        settings: What to generate.
        new_tokens: Most tokens to add.
        vocabulary: Ids below this one may be generated.
        pad: Id that fills a finished row.
        past: A cache that holds the beginning of the prompts, or None.
    """

    ids: NDArray[Any]
    mask: NDArray[Any] | None
    settings: GenerationConfig
    new_tokens: int
    vocabulary: int
    pad: int
    past: KVCache | None = None

    @property
    def slots(self) -> int:
        """Slots S of the history and the cache."""
        return bucket(self.ids.shape[1] + self.new_tokens)

    @property
    def block(self) -> int | None:
        """Tokens of the prompts to read at a time; None: all, with nothing before them."""
        T, chunk = self.ids.shape[1], self.settings.prefill_chunk_size
        if self.past is None:
            return None if chunk is None or chunk >= T else chunk
        return min(chunk or T, bucket(T - int(self.past.length)))


class _Rows(NamedTuple):
    """The rows being generated.

    Attributes:
        history: (R, S) prompts, then what was generated, then `pad`.
        real: bool (R, S), False at the prompts' padding.
        ended: bool (R,).
        token: (R,) the newest tokens.
        cache: Keys and values of all tokens but the newest.
        made: Tokens generated.
        prompt: Slots of the prompts.
    """

    history: Array
    real: Array
    ended: Array
    token: Array
    cache: KVCache
    made: int | Array
    prompt: Array


def prepare(
    model: "FlaxOPTForCausalLM",
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
    checked = check_inputs(config, model.dtype, input_ids, attention_mask, None, None, None)
    ids, mask = (None if x is None else np.asarray(x) for x in checked[:2])
    assert ids is not None
    pads = _padding_ids(model, settings)
    texts = {config.bos_token_id, config.eos_token_id, *settings.eos_ids}
    if mask is None and pads and pads[0] not in texts:
        # As transformers: an id that is nothing but padding is padding. Not so a BOS or EOS.
        mask = ids != pads[0]
    mask = None if mask is None or mask.all() else mask
    longest = ids.shape[1]
    if mask is not None:
        longest = int(mask.sum(1).max())
        for row in (~mask[:, -1]).nonzero()[0][:1].tolist():
            raise GenerationError(
                f"prompt {row} ends in padding; "
                "pad on the left: tokenizer(..., padding_side='left')"
            )
    settings.check(config, ids.shape[1], longest, tokenizer is not None)
    vocabulary = config.vocab_size
    if tokenizer is not None:
        # OPT's embedding has rows that no token has, never trained (transformers #18268).
        vocabulary = min(vocabulary, tokenizer.vocab_size)
    if past_key_values is not None:
        check_prefix(config, model.dtype, past_key_values, ids, mask)
    new_tokens, pad = settings.new_tokens(ids.shape[1]), _filler(model, settings)
    return Request(ids, mask, settings, new_tokens, vocabulary, pad, past_key_values)


def model_settings(
    model: "FlaxOPTForCausalLM", config: GenerationConfig | None
) -> GenerationConfig:
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


def stream(
    model: "FlaxOPTForCausalLM", request: Request, seed: int, tokenizer: OPTTokenizer | None
) -> Iterator[Array]:
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
    graph, state, rows, numbers = _begin(model, request, seed)
    stops = request.settings.stops if tokenizer is not None else ()
    count = len(rows.ended) if stops else 0
    trackers = [StopStringTracker(tokenizer, stops) for _ in range(count) if tokenizer]
    can_end = bool(request.settings.eos_ids or stops)
    for made in range(1, request.new_tokens + 1):
        if trackers:
            hits = [t.push(i) for t, i in zip(trackers, rows.token.tolist(), strict=True)]
            rows = rows._replace(ended=rows.ended | np.array(hits))
        yield rows.token
        if made == request.new_tokens or (can_end and bool(rows.ended.all())):
            return
        rows = _step(graph, state, rows._replace(token=rows.token.copy()), numbers)


def allocate_tokens(request: Request, copies: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The prompts, each so many times, with room behind them, and where tokens are real."""
    ids, mask = request.ids, request.mask
    mask = np.ones(ids.shape, bool) if mask is None else mask
    free = ((0, 0), (0, request.slots - ids.shape[1]))
    return (
        np.pad(ids, free, constant_values=request.pad).repeat(copies, 0),
        np.pad(mask, free, constant_values=True).repeat(copies, 0),
    )


def bucketed(request: Request) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The prompts and their mask, filled up on the right to the length of a bucket.

    What lies on the right is hidden by causality; new tokens take its slots.
    """
    T, mask = request.ids.shape[1], request.mask
    free = ((0, 0), (0, bucket(T) - T))
    if mask is not None:
        slots = bucket(T) if request.block is None else request.slots
        mask = np.pad(mask, ((0, 0), (0, slots - T)), constant_values=True)
    return np.pad(request.ids, free, constant_values=request.pad), mask


def check_logits(best_B: Array) -> None:
    """Refuses rows in which no token can come: all are banned, or the model gave NaN.

    Args:
        best_B: The highest logit of each row.
    """
    best = np.asarray(best_B)
    for row in (~np.isfinite(best)).nonzero()[0][:1].tolist():
        reason = "the logits are NaN" if np.isnan(best[row]) else "every token is banned"
        raise GenerationError(f"row {row}: no token can be generated: {reason}")


def generate(
    model: "FlaxOPTForCausalLM", request: Request, seed: int, tokenizer: OPTTokenizer | None
) -> Array:
    """The prompts and all that `stream` yields after them."""
    if request.settings.stops and tokenizer is not None:  # texts are watched on the host
        new = [np.asarray(token) for token in stream(model, request, seed, tokenizer)]
        prompts = request.ids.repeat(request.settings.num_return_sequences, 0)
        return jnp.asarray(np.concatenate([prompts, np.stack(new, 1)], 1))
    graph, state, rows, numbers = _begin(model, request, seed)
    rows = _loop(graph, state, rows, numbers, request.new_tokens)
    length = request.ids.shape[1] + int(rows.made)
    return jnp.asarray(np.asarray(rows.history)[:, :length])


def mask_vocabulary(logits_BV: Array, vocabulary: int | Array) -> Array:
    """Logits in float32, ids from `vocabulary` on banned."""
    known = jnp.arange(logits_BV.shape[1]) < vocabulary
    return jnp.where(known, logits_BV.astype(jnp.float32), sampling.BANNED)


def _padding_ids(model: "FlaxOPTForCausalLM", settings: GenerationConfig) -> list[int]:
    """Ids that mean padding, the settings' first."""
    return [i for i in (settings.pad_token_id, model.config.pad_token_id) if i is not None]


def _filler(model: "FlaxOPTForCausalLM", settings: GenerationConfig) -> int:
    """Id that fills a finished row."""
    return [*_padding_ids(model, settings), *settings.eos_ids, 0][0]


class _Numbers(NamedTuple):
    """What a program takes as arguments besides the model and the rows."""

    settings: TracedSettings
    key: Array
    vocabulary: int
    pad: int


def _begin(
    model: "FlaxOPTForCausalLM", request: Request, seed: int
) -> tuple[Any, Any, _Rows, _Numbers]:
    """Reads the prompts and chooses the first token; the model comes back in its two parts."""
    graph, state = nnx.split(model)
    settings, (_, T) = request.settings, request.ids.shape
    key = jax.random.fold_in(jax.random.key(seed % 2**31), seed // 2**31)
    numbers = _Numbers(TracedSettings.of(settings), key, request.vocabulary, request.pad)
    history, real = allocate_tokens(request, settings.num_return_sequences)
    ids, mask = bucketed(request)
    rows, best = _first(
        graph, state, ids, mask, history, real, np.int32(T), numbers, request.past, request.block
    )
    check_logits(best)
    return graph, state, rows, numbers


@partial(jax.jit, static_argnames=("graph", "block"))
def _first(
    graph: Any,
    state: Any,
    ids_BT: Array,
    mask_BT: Array | None,
    history_RS: Array,
    real_RS: Array,
    length: Array,
    numbers: _Numbers,
    past: KVCache | None = None,
    block: int | None = None,
) -> tuple[_Rows, Array]:
    """The rows with their first token, and the highest logit of each."""
    model, R = nnx.merge(graph, state), history_RS.shape[0]
    logits, cache = prefill_prompts(model, ids_BT, mask_BT, real_RS, length, past, block)
    rows = _Rows(history_RS, real_RS, jnp.zeros(R, bool), jnp.zeros(R, jnp.int32), cache, 0, length)
    rows, scores = _choose(rows, logits, numbers, model.mesh)
    return rows, replicate(scores.max(-1), model.mesh)


def _choose(
    rows: _Rows, logits: Array, numbers: _Numbers, mesh: Mesh | None
) -> tuple[_Rows, Array]:
    """Gives every row its next token; returns the constrained logits too."""
    settings, end = numbers.settings, rows.prompt + rows.made
    real = rows.real & (jnp.arange(rows.real.shape[1]) < end)
    scores = mask_vocabulary(logits, numbers.vocabulary)
    scores = sampling.process_logits(scores, rows.history, real, end, rows.made, settings)
    token = sampling.select_tokens(scores, settings, jax.random.fold_in(numbers.key, rows.made))
    token = replicate(jnp.where(rows.ended, numbers.pad, token), mesh)
    ended = rows.ended | jnp.isin(token, jnp.array(settings.eos_ids, jnp.int32))
    history = lax.dynamic_update_slice(rows.history, token[:, None], (0, end))
    rows = rows._replace(history=history, ended=ended, token=token, made=rows.made + 1)
    return rows, scores


def _advance(model: Any, rows: _Rows, numbers: _Numbers) -> _Rows:
    """Reads the newest token of every row and chooses the next."""
    logits, cache = decode_step(model, rows.token, rows.cache)
    return _choose(rows._replace(cache=cache), logits, numbers, model.mesh)[0]


@partial(jax.jit, static_argnames="graph", donate_argnames="rows")
def _step(graph: Any, state: Any, rows: _Rows, numbers: _Numbers) -> _Rows:
    """One more token per row."""
    return _advance(nnx.merge(graph, state), rows, numbers)


@partial(jax.jit, static_argnames="graph", donate_argnames="rows")
def _loop(graph: Any, state: Any, rows: _Rows, numbers: _Numbers, limit: int) -> _Rows:
    """Tokens until there are `limit` of them or every row has ended."""
    model = nnx.merge(graph, state)

    def keep_going(rows: _Rows) -> Array:
        return (rows.made < limit) & ~rows.ended.all()

    def advance(rows: _Rows) -> _Rows:
        rows = _advance(model, rows._replace(cache=rows.cache.unsqueezed()), numbers)
        return rows._replace(cache=rows.cache.squeezed())

    rows = lax.while_loop(keep_going, advance, rows._replace(cache=rows.cache.squeezed()))
    history = replicate(rows.history, model.mesh)
    return rows._replace(history=history, cache=rows.cache.unsqueezed())
