"""Reading prompts: all at once, in pieces, or behind what a cache holds of them already."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from opt_tf.cache import KVCache
from opt_tf.linear import sizes

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def prefill_prompts(
    model: "TFOPTForCausalLM", settings: Any, inputs: dict[str, Any]
) -> tuple[tf.Tensor, KVCache]:
    """Reads the prompts of a request, without what its cache has of them already.

    Args:
        model: The language model.
        settings: Of a program; `block` is the number of tokens to read at a time, None for all.
        inputs: Of a program; `past` is there where a cache holds the beginning of the prompts.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    (B, S), mask, past = sizes(inputs["history"]), inputs["mask"], inputs.get("past")
    cache = model.init_cache(B, S) if past is None else KVCache(*past).resize(B, S)
    if settings.block is None:
        return prefill(model, inputs["ids"], mask, cache, inputs["prompt"])
    return _prefill_blocks(model, inputs["ids"], mask, cache, inputs["prompt"], settings.block)


def prefill(
    model: "TFOPTForCausalLM",
    ids_BT: tf.Tensor,
    mask_BS: tf.Tensor | None,
    cache: KVCache,
    length: tf.Tensor | None = None,
) -> tuple[tf.Tensor, KVCache]:
    """Reads the prompts.

    Args:
        model: The language model.
        ids_BT: Prompts.
        mask_BS: bool, False at padding.
        cache: An empty cache, or what came before.
        length: Tokens T there really are, where the prompts are padded on the right, all alike;
            the cache is empty and `mask_BS` spans all of its slots then.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    decoder, T = model.get_decoder(), sizes(ids_BT)[1]
    seen = mask_BS
    if mask_BS is not None and length is not None:
        seen = mask_BS[:, :T] & (tf.range(T) < length)
    out = decoder(decoder.embed_tokens(ids_BT), mask_BS=seen, cache=cache, training=False)
    last = T - 1 if length is None else length - 1
    cache = out.past_key_values
    if length is not None:  # what is behind the prompts will be overwritten
        cache = replace(cache, length=length, mask=mask_BS)
    return model.compute_logits(tf.gather(out.last_hidden_state, last, axis=1)), cache


def _prefill_blocks(
    model: "TFOPTForCausalLM",
    ids_BT: tf.Tensor,
    mask_BS: tf.Tensor,
    cache: KVCache,
    length: tf.Tensor,
    block: int,
) -> tuple[tf.Tensor, KVCache]:
    decoder, past = model.get_decoder(), tf.convert_to_tensor(cache.length)

    def read(i: tf.Tensor, hidden: tf.Tensor, keys: Any, values: Any) -> Any:
        # The last block ends where the prompts do: some of it may be read a second time.
        start = tf.maximum(tf.minimum(past + i * block, length - block), 0)
        ids = tf.gather(ids_BT, start + tf.range(block), axis=1)
        cache = KVCache(keys, values, start, mask_BS)
        out = decoder(decoder.embed_tokens(ids), mask_BS=mask_BS, cache=cache, training=False)
        last = tf.minimum(length - start, block) - 1
        hidden = tf.gather(out.last_hidden_state, last, axis=1)
        return i + 1, hidden, out.past_key_values.keys, out.past_key_values.values

    nothing = tf.zeros((sizes(ids_BT)[0], model.config.embed_dim), model.compute_dtype)
    count = (length - past + block - 1) // block
    _, hidden, keys, values = tf.while_loop(
        lambda i, *_: i < count, read, (tf.constant(0), nothing, cache.keys, cache.values)
    )
    return model.compute_logits(hidden), KVCache(keys, values, length, mask_BS)
