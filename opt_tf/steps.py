"""A generation's steps one by one: what `opt_core.generation.observed` asks of a framework."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import tensorflow as tf
from numpy.typing import NDArray

from opt_core.generation.request import Ids, Mask, Request
from opt_core.generation.rules import Rules
from opt_tf.cache import KVCache
from opt_tf.compilation import compiled, program_rules
from opt_tf.linear import sizes

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def observe(
    model: "TFOPTForCausalLM",
    ids_RT: Ids | None,
    embeds_BTP: tf.Tensor | None,
    copies: int,
    mask_RT: Mask | None,
    cache: KVCache | None,
    slots: int,
    output_attentions: bool,
    output_hidden_states: bool,
) -> tuple[tf.Tensor, KVCache, Any, Any]:
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
        embeds, None, mask, cache, output_hidden_states, output_attentions, training=False
    )
    logits, cache = model.compute_logits(out.last_hidden_state[:, -1]), out.past_key_values
    parts = cache.keys, cache.values, tf.convert_to_tensor(cache.length), cache.mask
    return logits, parts, out.attentions, out.hidden_states


def request_rules(model: "TFOPTForCausalLM", request: Request) -> Rules:
    """The rules of a request, as tensors of the framework."""
    return program_rules(request)


def random_source(model: "TFOPTForCausalLM", seed: int) -> Callable[[int], tf.Tensor]:
    """What draws the token of each number."""
    return lambda made: tf.constant([seed, made], tf.int64)


def draw_seed() -> int:
    """A seed out of TensorFlow's own generator, so that `tf.random.set_seed` decides it."""
    return int(tf.random.uniform((), 0, 2**63 - 1, tf.int64))


def to_tensor(model: "TFOPTForCausalLM", values: Any) -> tf.Tensor:
    """NumPy's values as a tensor."""
    return tf.convert_to_tensor(values)


def to_array(values: tf.Tensor) -> NDArray[Any]:
    """NumPy's values."""
    return values.numpy()
