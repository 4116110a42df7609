"""A generation's steps one by one: what `opt_core.generation.observed` asks of a framework."""

import secrets
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from opt_core.generation.request import Ids, Mask, Request
from opt_core.generation.rules import Rules
from opt_flax.cache import KVCache
from opt_flax.compilation import make_key, program_rules

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


def observe(
    model: "FlaxOPTForCausalLM",
    ids_RT: Ids | None,
    embeds_BTP: Array | None,
    copies: int,
    mask_RT: Mask | None,
    cache: KVCache | None,
    slots: int,
    output_attentions: bool,
    output_hidden_states: bool,
) -> tuple[Array, KVCache, Any, Any]:
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


@partial(jax.jit, static_argnames=("graph", "slots", "output_hidden_states", "output_attentions"))
def _read(
    graph: Any, state: Any, ids_RT: Any, embeds_RTP: Array | None, mask_RT: Any,
    cache: KVCache | None, slots: int, output_hidden_states: bool, output_attentions: bool,
) -> tuple[Array, KVCache, Any, Any]:  # fmt: skip
    model = nnx.merge(graph, state)
    decoder = model.get_decoder()
    embeds = decoder.embed_tokens(ids_RT) if embeds_RTP is None else embeds_RTP
    if cache is None:
        cache, mask = model.init_cache(embeds.shape[0], slots), mask_RT
    else:
        mask = cache.mask
    out = decoder(
        embeds, None, mask, cache, output_hidden_states, output_attentions, deterministic=True
    )
    logits = model.compute_logits(out.last_hidden_state[:, -1])
    return logits, out.past_key_values, out.attentions, out.hidden_states


def request_rules(model: "FlaxOPTForCausalLM", request: Request) -> Rules:
    """The rules of a request, as arrays of the framework."""
    return program_rules(request)


def random_source(model: "FlaxOPTForCausalLM", seed: int) -> Callable[[int], Array]:
    """What draws the token of each number."""
    key = make_key(seed)
    return lambda made: jax.random.fold_in(key, made)


def draw_seed() -> int:
    """A fresh seed: JAX has no generator of its own that could decide it."""
    return secrets.randbits(63)


def to_tensor(model: "FlaxOPTForCausalLM", values: Any) -> Array:
    """NumPy's values on the device."""
    return jnp.asarray(values)


def to_array(values: Array) -> NDArray[Any]:
    """NumPy's values."""
    return np.asarray(values)
