"""Model inputs: made into tensors and checked before anything is computed."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_flax.cache import KVCache


def check_inputs(
    config: OPTConfig,
    dtype: jnp.dtype,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    cache: KVCache | None,
) -> tuple[Array | None, Array | None, Array | None, Array | None]:
    """Turns tensors and lists into JAX arrays and checks shapes and ranges.

    Args:
        config: The model's configuration.
        dtype: Type of its weights.
        input_ids: (B, T) ids, or None.
        attention_mask: (B, T) or (B, past + T), or None.
        position_ids: (B, T), or None.
        inputs_embeds: (B, T, P), or None.
        cache: What came before, or None.

    Returns:
        The four inputs as arrays or None, the mask as bool.

    Raises:
        InputError: What does not fit, expected and received.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("expected either input_ids or inputs_embeds, received both or neither")
    ids = as_integers("input_ids", input_ids)
    if ids is not None:
        check_range("input_ids", ids, 0, config.vocab_size - 1, f"vocab_size={config.vocab_size}")
        B, T = ids.shape
    else:
        inputs_embeds = as_tensor("inputs_embeds", inputs_embeds).astype(dtype)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.embed_dim:
            raise InputError(
                f"inputs_embeds: expected shape (B, T, {config.embed_dim}), "
                f"received {tuple(inputs_embeds.shape)}"
            )
        B, T = inputs_embeds.shape[:2]
    if B == 0 or T == 0:
        raise InputError(
            f"the input is empty: expected rows with tokens, received shape ({B}, {T})"
        )
    positions = as_integers("position_ids", position_ids)
    if positions is not None:
        if positions.shape[1] != T or positions.shape[0] not in (1, B):
            raise InputError(
                f"position_ids: expected shape ({B}, {T}), received {tuple(positions.shape)}"
            )
        window = config.max_position_embeddings
        check_range("position_ids", positions, -1, window - 1, f"max_position_embeddings={window}")
    mask = as_integers("attention_mask", attention_mask)
    if mask is not None:
        slots = T if cache is None else cache.filled(T)
        if tuple(mask.shape) not in ((B, T), (B, slots)):
            raise InputError(
                f"attention_mask: expected shape ({B}, {T})"
                + (f" or ({B}, {slots})" if slots != T else "")
                + f", received {tuple(mask.shape)}"
            )
        check_range("attention_mask", mask, 0, 1, "1 for tokens and 0 for padding")
        mask = mask.astype(bool)
    if cache is not None:
        check_cache(config, dtype, cache, B, T)
    return ids, mask, positions, inputs_embeds


def check_cache(config: OPTConfig, dtype: jnp.dtype, cache: KVCache, rows: int, count: int) -> None:
    """Refuses a cache that another model made, or that is too small.

    Args:
        config: The model's configuration.
        dtype: Type of its weights.
        cache: The cache.
        rows: Rows B of the input.
        count: New tokens T.
    """
    keys = cache.keys[0]
    made = (len(cache.keys), keys.shape[1], keys.shape[3], keys.dtype.name)
    expected = (
        config.num_hidden_layers, config.num_attention_heads, config.head_dim, jnp.dtype(dtype).name
    )  # fmt: skip
    if made != expected:
        raise InputError(
            "past_key_values is of another model: expected (layers, heads, head size, dtype) "
            f"{expected}, received {made}"
        )
    if keys.shape[0] != rows:
        raise InputError(f"past_key_values holds {keys.shape[0]} rows, the input has {rows}")
    taken = int(cache.length) if is_known(cache.length) else 0
    if taken + count > cache.max_length:
        raise InputError(
            f"past_key_values has {cache.max_length} slots; "
            f"{taken} are taken and {count} more are needed"
        )


def check_prefix(
    config: OPTConfig, dtype: jnp.dtype, cache: Any, ids_BT: Any, mask_BT: Any
) -> None:
    """Refuses a cache that cannot hold the beginning of some prompts.

    Args:
        config: The model's configuration.
        dtype: Type of its weights.
        cache: What the caller passed as `past_key_values`.
        ids_BT: The whole prompts.
        mask_BT: bool, False at padding; None if nothing is padded.
    """
    if not isinstance(cache, KVCache):
        raise InputError(
            f"past_key_values: expected a cache of this model, received {type(cache).__name__}"
        )
    rows, used, (B, T) = cache.keys[0].shape[0], int(cache.length), ids_BT.shape
    check_cache(config, dtype, cache, rows, 0)
    if rows not in (1, B):
        raise InputError(f"past_key_values holds {rows} rows, the input has {B}")
    if used >= T:
        raise InputError(
            f"past_key_values holds {used} tokens: expected input_ids that begin with them and go "
            f"on, received {T} tokens"
        )
    before = np.ones((1, used), bool)
    seen = before if cache.mask is None else np.asarray(cache.mask)[:, :used]
    given = before if mask_BT is None else mask_BT[:, :used]
    if (seen != given).any():
        raise InputError("attention_mask and past_key_values disagree about where padding is")


def full_mask(mask_BT: Array | None, count: int, cache: KVCache | None) -> Array | None:
    """The mask over everything: what the cache remembers and the new tokens.

    Args:
        mask_BT: bool mask of the new tokens, or of the past ones too; None: they are all real.
        count: New tokens T.
        cache: What came before, or None.

    Returns:
        bool (B, T), or (B, S) over all slots of a cache that is not empty; None where nothing is
        padded.
    """
    if mask_BT is None:
        return None if cache is None else cache.mask
    if cache is not None and not cache.is_empty:
        before = cache.mask
        if before is None:
            before = jnp.ones((mask_BT.shape[0], cache.max_length), bool)
        start = cache.length if mask_BT.shape[1] == count else 0
        mask_BT = lax.dynamic_update_slice(before, mask_BT, (0, start))
    # A mask of ones would only keep the fast causal kernels from running.
    return None if is_known(mask_BT) and bool(mask_BT.all()) else mask_BT


def check_window(config: OPTConfig, mask_BS: Array | None, length: int) -> None:
    """Refuses a sequence that has more tokens than the model has positions.

    Args:
        config: The model's configuration.
        mask_BS: bool, False at padding; None if there is none.
        length: Tokens S in all, padding included.
    """
    window = config.max_position_embeddings
    if length <= window or (mask_BS is not None and not is_known(mask_BS)):
        return
    longest = length if mask_BS is None else int(np.asarray(mask_BS)[:, :length].sum(1).max())
    if longest > window:
        raise InputError(f"a sequence of {longest} tokens exceeds max_position_embeddings={window}")


def as_integers(name: str, values: Any) -> Array | None:
    """A 2-D int32 array, or None; where values can be looked at they must fit into int32."""
    if values is None:
        return None
    array = values if isinstance(values, Array) else as_tensor(name, values)
    if not (jnp.issubdtype(array.dtype, jnp.integer) or array.dtype == bool) or array.ndim != 2:
        raise InputError(
            f"{name}: expected integers of shape (B, T), "
            f"received {array.dtype} of shape {tuple(array.shape)}"
        )
    return array.astype(jnp.int32)


def as_tensor(name: str, values: Any) -> Array:
    """Numbers as a JAX array; 64-bit integers beyond int32 are refused, not wrapped."""
    if isinstance(values, Array):
        return values
    try:
        array = np.asarray(values)
        if array.dtype.kind in "iu" and array.size:
            check_range(name, array, -(2**31), 2**31 - 1, "int32")
        return jnp.asarray(array)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name}: expected numbers in a regular shape: {reason}") from None


def check_range(name: str, values: Any, low: int, high: int, why: str) -> None:
    """Refuses values outside low..high, where they can be looked at."""
    if not is_known(values) or values.size == 0:
        return
    values = np.asarray(values)
    least, most = int(values.min()), int(values.max())
    if least < low or most > high:
        raise InputError(
            f"{name}: expected values in {low}..{high} ({why}), received {least}..{most}"
        )


def is_known(value: Any) -> bool:
    """Whether values can be read now: not while tracing, nor where other hosts hold parts."""
    if isinstance(value, Tracer):
        return False
    return not isinstance(value, Array) or value.is_fully_addressable
