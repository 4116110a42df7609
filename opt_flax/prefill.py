"""Reading prompts: all at once, in pieces, or behind what a cache holds of them already."""

from dataclasses import replace
from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import Array, lax

from opt_flax.cache import KVCache, init_cache

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def prefill_prompts(
    model: "FlaxOPTForCausalLM",
    ids_BT: Array,
    mask_BT: Array | None,
    real_RS: Array,
    length: int | Array,
    past: KVCache | None,
    block: int | None,
) -> tuple[Array, KVCache]:
    """Reads the prompts of a request, without what its cache has of them already.

    Args:
        model: The language model.
        ids_BT: Prompts, as for `prefill`.
        mask_BT: As for `prefill`.
        real_RS: Of the shape that the cache shall have; each prompt has R / B rows.
        length: As for `prefill`.
        past: A cache that holds the beginning of the prompts; None: there is none.
        block: As for `prefill`.

    Returns:
        Logits (R, V) after the last token, and the cache that holds the prompts.
    """
    (B, _), (R, S) = ids_BT.shape, real_RS.shape
    if past is None:
        cache = init_cache(model.config, B, S, model.dtype, model.mesh)
    else:
        cache = past.resize(B, S, model.mesh)
    logits, cache = prefill(model, ids_BT, mask_BT, cache, length, block)
    if R > B:
        copies = jnp.zeros((B, R // B), jnp.int32)
        logits, cache = jnp.repeat(logits, R // B, 0), cache.regroup(copies, model.mesh)
    return logits, cache


def prefill(
    model: "FlaxOPTForCausalLM",
    ids_BT: Array,
    mask_BT: Array | None,
    cache: KVCache,
    length: int | Array | None = None,
    block: int | None = None,
) -> tuple[Array, KVCache]:
    """Reads the prompts.

    Args:
        model: The language model.
        ids_BT: Prompts; what lies behind `length` is only there to fill a bucket.
        mask_BT: bool, False at padding, over all slots where there is a `block`; None if nothing
            is padded.
        cache: An empty cache; where there is a `block`, it may hold the beginning of the prompts.
        length: Slots of the prompts; None: T.
        block: Tokens to read at a time; None: all at once.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    length = ids_BT.shape[1] if length is None else length
    if block is not None:
        return _prefill_blocks(model, ids_BT, mask_BT, cache, length, block)
    decoder = model.get_decoder()
    out = decoder(decoder.embed_tokens(ids_BT), None, mask_BT, cache, deterministic=True)
    assert out.last_hidden_state is not None
    assert out.past_key_values is not None
    last = lax.dynamic_index_in_dim(out.last_hidden_state, length - 1, 1, keepdims=False)
    return model.compute_logits(last), replace(out.past_key_values, length=length)


def _prefill_blocks(
    model: "FlaxOPTForCausalLM",
    ids_BT: Array,
    mask_BS: Array | None,
    cache: KVCache,
    length: int | Array,
    block: int,
) -> tuple[Array, KVCache]:
    decoder, past = model.get_decoder(), cache.length

    def read(i: Array, carry: tuple[Array, KVCache]) -> tuple[Array, KVCache]:
        # The last block ends where the prompts do: some of it may be read a second time.
        start = jnp.maximum(jnp.minimum(past + i * block, length - block), 0)
        ids = lax.dynamic_slice_in_dim(ids_BT, start, block, 1)
        cache = replace(carry[1], length=start)
        out = decoder(decoder.embed_tokens(ids), None, mask_BS, cache, deterministic=True)
        assert out.last_hidden_state is not None
        assert out.past_key_values is not None
        last = jnp.minimum(length - start, block) - 1
        hidden = lax.dynamic_index_in_dim(out.last_hidden_state, last, 1, keepdims=False)
        return hidden, replace(out.past_key_values, length=jnp.asarray(length, jnp.int32))

    nothing = jnp.zeros((ids_BT.shape[0], model.config.embed_dim), model.dtype)
    cache = replace(cache, length=jnp.asarray(past, jnp.int32), mask=mask_BS)
    count = (length - past + block - 1) // block
    hidden, cache = lax.fori_loop(0, count, read, (nothing, cache))
    return model.compute_logits(hidden), cache
