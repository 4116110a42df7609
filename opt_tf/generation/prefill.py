"""Reading prompts: all at once, in chunks, or behind what a cache holds of them already."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from opt_core.generation.request import Ids, Mask, Request
from opt_tf.cache import KVCache
from opt_tf.compilation import compiled, prompt_inputs
from opt_tf.linear import sizes

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def prefill_prompts(
    model: "TFOPTForCausalLM", prompts: dict[str, Any], chunk: int | None, slots: int
) -> tuple[tf.Tensor, KVCache]:
    """Reads the prompts of a request, without what its cache has of them already.

    Args:
        model: The language model.
        prompts: Inputs of a program; `past` is there where a cache holds the beginning of them.
        chunk: Tokens to read at a time; None: all at once, with nothing before them.
        slots: Slots S of the cache.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    B, past = sizes(prompts["ids"])[0], prompts.get("past")
    cache = model.init_cache(B, slots) if past is None else KVCache(*past).resize(B, slots)
    ids, mask, length = prompts["ids"], prompts["mask"], prompts["prompt"]
    return prefill(model, ids, mask, cache, chunk, length)


def read_prompts(
    model: "TFOPTForCausalLM", request: Request, slots: int, copies: int
) -> tuple[tf.Tensor, KVCache]:
    """Reads the prompts of a request, and makes several rows of each.

    The program that reads them is the same for all that may follow.

    Args:
        model: The language model.
        request: What to generate.
        slots: Slots S of the cache.
        copies: Rows of each prompt; there are R of them in all.

    Returns:
        Logits (R, V) after the last token, and the cache that holds the prompts.
    """
    prompts = prompt_inputs(request, slots)
    logits, keys, values = compiled(model, _read_prompts, request.chunk, slots)(prompts)
    return copy_rows(logits, KVCache(keys, values, prompts["prompt"], prompts["mask"]), copies)


def _read_prompts(
    model: "TFOPTForCausalLM", chunk: int | None, slots: int, prompts: dict[str, Any]
) -> tuple[Any, ...]:
    logits, cache = prefill_prompts(model, prompts, chunk, slots)
    return logits, cache.keys, cache.values


def copy_rows(logits_BV: tf.Tensor, cache: KVCache, copies: int) -> tuple[tf.Tensor, KVCache]:
    """Several rows of each prompt: logits (B * copies, V), and the cache that goes with them."""
    if copies == 1:
        return logits_BV, cache
    rows = tf.repeat(tf.range(sizes(logits_BV)[0]), copies)
    return tf.gather(logits_BV, rows), cache.select(rows)


def prefill(
    model: "TFOPTForCausalLM",
    ids_BT: tf.Tensor,
    mask_BS: tf.Tensor | None,
    cache: KVCache,
    chunk: int | None = None,
    length: tf.Tensor | None = None,
) -> tuple[tf.Tensor, KVCache]:
    """Reads the prompts.

    Args:
        model: The language model.
        ids_BT: Prompts.
        mask_BS: bool, False at padding.
        cache: An empty cache, or what came before.
        chunk: Tokens to read at a time, the cache's among the prompts; None: all at once.
        length: Tokens T there really are, where the prompts are padded on the right, all alike;
            `mask_BS` spans all of the cache's slots then, and the cache is empty unless there is a
            `chunk`.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    decoder, T = model.get_decoder(), sizes(ids_BT)[1]
    if chunk is not None:
        end = T if length is None else length
        return _prefill_chunks(model, ids_BT, mask_BS, cache, chunk, end)
    seen = mask_BS
    if mask_BS is not None and length is not None:
        seen = mask_BS[:, :T] & (tf.range(T) < length)
    out = decoder(decoder.embed_tokens(ids_BT), mask_BS=seen, cache=cache, training=False)
    last = T - 1 if length is None else length - 1
    cache = out.past_key_values
    if length is not None:  # what is behind the prompts will be overwritten
        cache = replace(cache, length=length, mask=mask_BS)
    return model.compute_logits(tf.gather(out.last_hidden_state, last, axis=1)), cache


def _prefill_chunks(
    model: "TFOPTForCausalLM",
    ids_BT: tf.Tensor,
    mask_BS: tf.Tensor | None,
    cache: KVCache,
    chunk: int,
    length: Any,
) -> tuple[tf.Tensor, KVCache]:
    decoder, past = model.get_decoder(), tf.convert_to_tensor(cache.length)

    def read(i: tf.Tensor, hidden: tf.Tensor, keys: Any, values: Any) -> Any:
        # The last chunk ends where the prompts do: some of it may be read a second time.
        start = tf.maximum(tf.minimum(past + i * chunk, length - chunk), 0)
        ids = tf.gather(ids_BT, start + tf.range(chunk), axis=1)
        cache = KVCache(keys, values, start, mask_BS)
        out = decoder(decoder.embed_tokens(ids), mask_BS=mask_BS, cache=cache, training=False)
        last = tf.minimum(length - start, chunk) - 1
        hidden = tf.gather(out.last_hidden_state, last, axis=1)
        return i + 1, hidden, out.past_key_values.keys, out.past_key_values.values

    nothing = tf.zeros((sizes(ids_BT)[0], model.config.embed_dim), model.compute_dtype)
    count = (length - past + chunk - 1) // chunk
    _, hidden, keys, values = tf.while_loop(
        lambda i, *_: i < count, read, (tf.constant(0), nothing, cache.keys, cache.values)
    )
    return model.compute_logits(hidden), KVCache(keys, values, length, mask_BS)


def observe(
    model: "TFOPTForCausalLM", ids_RT: Ids | None, embeds_BTP: tf.Tensor | None, copies: int,
    mask_RT: Mask | None, cache: KVCache | None, slots: int,
    output_attentions: bool, output_hidden_states: bool,
) -> tuple[tf.Tensor, KVCache, Any, Any]:  # fmt: skip
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
    program = compiled(model, _read, slots, output_hidden_states, output_attentions)
    ids = None if ids_RT is None else tf.constant(ids_RT)
    embeds = None if embeds_BTP is None else tf.repeat(embeds_BTP, copies, 0)
    mask = None if mask_RT is None else tf.constant(mask_RT)
    held = None
    if cache is not None:
        length = tf.convert_to_tensor(cache.length, tf.int32)
        held = cache.keys, cache.values, length, cache.mask
    logits, parts, attentions, states = program(ids, embeds, mask, held)
    return logits, KVCache(*parts), attentions, states


def _read(
    model: "TFOPTForCausalLM",
    slots: int,
    output_hidden_states: bool,
    output_attentions: bool,
    ids_RT: tf.Tensor | None,
    embeds_RTP: tf.Tensor | None,
    mask_RT: tf.Tensor | None,
    held: Any,
) -> tuple[Any, ...]:
    decoder = model.get_decoder()
    embeds = decoder.embed_tokens(ids_RT) if embeds_RTP is None else embeds_RTP
    if held is None:
        cache, mask = model.init_cache(sizes(embeds)[0], slots), mask_RT
    else:
        cache = KVCache(*held)
        mask = cache.mask
    out = decoder(
        embeds, mask_BS=mask, cache=cache, output_hidden_states=output_hidden_states,
        output_attentions=output_attentions, training=False,
    )  # fmt: skip
    logits, cache = model.compute_logits(out.last_hidden_state[:, -1]), out.past_key_values
    parts = cache.keys, cache.values, tf.convert_to_tensor(cache.length), cache.mask
    return logits, parts, out.attentions, out.hidden_states
