"""Reading prompts: all at once, in chunks, or behind what a cache holds of them already."""

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

from opt_core.generation.request import Ids, Mask
from opt_flax.cache import KVCache, init_cache
from opt_flax.programs import Program

if TYPE_CHECKING:
    from opt_flax.compilation import Prompts
    from opt_flax.modeling import FlaxOPTForCausalLM


def prefill_prompts(
    model: "FlaxOPTForCausalLM", prompts: "Prompts", chunk: int | None, slots: int
) -> tuple[Array, KVCache]:
    """Reads the prompts of a request, without what its cache has of them already.

    Args:
        model: The language model.
        prompts: Inputs of a program.
        chunk: Tokens to read at a time; None: all at once, with nothing before them.
        slots: Slots S of the cache.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    B, past = prompts.ids.shape[0], prompts.past
    cache = _empty_cache(model, B, slots) if past is None else past.resize(B, slots, model.mesh)
    return prefill(model, prompts.ids, prompts.mask, cache, chunk, prompts.length)


def copy_rows(
    logits_BV: Array, cache: KVCache, copies: int, mesh: Mesh | None
) -> tuple[Array, KVCache]:
    """Several rows of each prompt: logits (B * copies, V), and the cache that goes with them."""
    return (logits_BV, cache) if copies == 1 else _copy_rows(logits_BV, cache, copies, mesh)


@partial(Program, static_argnames=("copies", "mesh"))
def _copy_rows(logits_BV: Array, cache: KVCache, copies: int, mesh: Any) -> tuple[Array, KVCache]:
    rows = jnp.zeros((logits_BV.shape[0], copies), jnp.int32)
    return jnp.repeat(logits_BV, copies, 0), cache.regroup(rows, mesh)


def prefill(
    model: "FlaxOPTForCausalLM",
    ids_BT: Array,
    mask_BS: Array | None,
    cache: KVCache,
    chunk: int | None = None,
    length: int | Array | None = None,
) -> tuple[Array, KVCache]:
    """Reads the prompts.

    Args:
        model: The language model.
        ids_BT: Prompts; what lies behind `length` is only there to fill a bucket.
        mask_BS: bool, False at padding, over all slots where there is a `chunk`; None if nothing
            is padded.
        cache: An empty cache; where there is a `chunk`, it may hold the beginning of the prompts.
        chunk: Tokens to read at a time; None: all at once.
        length: Slots of the prompts; None: T.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    length = ids_BT.shape[1] if length is None else length
    if chunk is not None:
        return _prefill_chunks(model, ids_BT, mask_BS, cache, chunk, length)
    decoder = model.get_decoder()
    out = decoder(decoder.embed_tokens(ids_BT), None, mask_BS, cache, deterministic=True)
    assert out.last_hidden_state is not None
    assert out.past_key_values is not None
    last = lax.dynamic_index_in_dim(out.last_hidden_state, length - 1, 1, keepdims=False)
    return model.compute_logits(last), replace(out.past_key_values, length=length)


def _prefill_chunks(
    model: "FlaxOPTForCausalLM",
    ids_BT: Array,
    mask_BS: Array | None,
    cache: KVCache,
    chunk: int,
    length: int | Array,
) -> tuple[Array, KVCache]:
    decoder, past = model.get_decoder(), cache.length

    def read(i: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        # The last chunk ends where the prompts do: some of it may be read a second time.
        start = jnp.maximum(jnp.minimum(past + i * chunk, length - chunk), 0)
        ids = lax.dynamic_slice_in_dim(ids_BT, start, chunk, 1)
        cache = replace(carry[1], length=start)
        out = decoder(decoder.embed_tokens(ids), None, mask_BS, cache, deterministic=True)
        assert out.last_hidden_state is not None
        assert out.past_key_values is not None
        last = jnp.minimum(length - start, chunk) - 1
        hidden = lax.dynamic_index_in_dim(out.last_hidden_state, last, 1, keepdims=False)
        return hidden, replace(out.past_key_values, length=jnp.asarray(length, jnp.int32))

    nothing = jnp.zeros((ids_BT.shape[0], model.config.embed_dim), model.dtype)
    cache = replace(cache, length=jnp.asarray(past, jnp.int32), mask=mask_BS)
    count = (length - past + chunk - 1) // chunk
    hidden, cache = lax.fori_loop(0, count, read, (nothing, cache))
    return model.compute_logits(hidden), cache


def observe(
    model: "FlaxOPTForCausalLM", ids_RT: Ids | None, embeds_BTP: Array | None, copies: int,
    mask_RT: Mask | None, cache: KVCache | None, slots: int,
    output_attentions: bool, output_hidden_states: bool,
) -> tuple[Array, KVCache, Any, Any]:  # fmt: skip
    """Reads tokens, for `opt_core.generation.observed`.

    Args:
        model: The language model.
        ids_RT: Token ids; None: embeddings are given.
        embeds_BTP: Embeddings in their place, of one row in `copies`.
        copies: Rows of each row of embeddings.
        mask_RT: bool, False at padding, for the first tokens; None: nothing is padded.
        cache: What was read before; None: nothing.
        slots: Slots of the cache that is then made.
        output_attentions: Whether attention weights are wanted.
        output_hidden_states: Whether hidden states are wanted.

    Returns:
        Logits (R, V) after them, the cache that holds them, attention weights and hidden states.
    """
    graph, state = nnx.split(model)
    embeds = None if embeds_BTP is None else jnp.repeat(jnp.asarray(embeds_BTP), copies, 0)
    flags = output_hidden_states, output_attentions
    return _read(graph, state, ids_RT, embeds, mask_RT, cache, slots, *flags)


def _empty_cache(model: "FlaxOPTForCausalLM", rows: int, slots: int) -> KVCache:
    """An empty cache without a mask, of which the program is a faster one."""
    return init_cache(model.config, rows, slots, model.dtype, model.mesh)


@partial(Program, static_argnames=("graph", "slots", "output_hidden_states", "output_attentions"))
def _read(
    graph: Any, state: Any, ids_RT: Any, embeds_RTP: Array | None, mask_RT: Any,
    cache: KVCache | None, slots: int, output_hidden_states: bool, output_attentions: bool,
) -> tuple[Array, KVCache, Any, Any]:  # fmt: skip
    model = nnx.merge(graph, state)
    decoder = model.get_decoder()
    embeds = decoder.embed_tokens(ids_RT) if embeds_RTP is None else embeds_RTP
    if cache is None:
        cache, mask = _empty_cache(model, embeds.shape[0], slots), mask_RT
    else:
        mask = cache.mask
    out = decoder(
        embeds, None, mask, cache, output_hidden_states, output_attentions, deterministic=True
    )
    logits = model.compute_logits(out.last_hidden_state[:, -1])
    return logits, out.past_key_values, out.attentions, out.hidden_states
