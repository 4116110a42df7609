"""Model inputs: made into tensors and checked before anything is computed."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from numpy.typing import NDArray

from opt_core import inputs as rules
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.generation.request import Ids, Mask
from opt_core.inputs import Range
from opt_flax.cache import KVCache


def check_inputs(
    config: OPTConfig,
    dtype: jnp.dtype,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    cache: KVCache | None,
) -> tuple[Array | None, Array | None, Array | None, Array | None, KVCache | None]:
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
        The four inputs as arrays or None, the mask as bool, and the cache with room for them.

    Raises:
        InputError: What does not fit, expected and received.
    """
    ids = as_integers("input_ids", input_ids)
    mask = as_integers("attention_mask", attention_mask)
    positions = as_integers("position_ids", position_ids)
    embeds = None
    if inputs_embeds is not None:
        embeds = as_tensor("inputs_embeds", inputs_embeds).astype(dtype)
    given = ids, mask, positions, embeds
    B, T = rules.check_inputs(config, *given, cache, check_ranges)
    if cache is not None:
        if is_known(cache.length):
            cache = replace(cache, length=int(cache.length))
        check_cache(config, dtype, cache, B, T)
        cache = cache.with_room(T)
    return ids, None if mask is None else mask.astype(bool), positions, embeds, cache


def check_prompts(model: Any, input_ids: Any, attention_mask: Any) -> tuple[Ids, Mask | None]:
    """Checks prompts, (B, T); the ids and their mask, or None, in NumPy."""
    ids, mask, *_ = check_inputs(
        model.config, model.dtype, input_ids, attention_mask, None, None, None
    )
    return np.asarray(ids), None if mask is None else np.asarray(mask)


def check_cache(
    config: OPTConfig, dtype: jnp.dtype, cache: KVCache, rows: int | None, count: int | None
) -> None:
    """Refuses a cache that another model made, or that is too small.

    Args:
        config: The model's configuration.
        dtype: Type of its weights.
        cache: The cache.
        rows: Rows B of the input.
        count: New tokens T.
    """
    kind = jnp.dtype(dtype).name
    rules.check_cache(config, kind, cache, lambda keys: keys.dtype.name, rows, count)


def check_prefix(model: Any, cache: Any, ids_BT: Ids, mask_BT: Mask | None) -> None:
    """Refuses a cache that cannot hold the beginning of some prompts.

    Args:
        model: The language model.
        cache: What the caller passed as `past_key_values`.
        ids_BT: The whole prompts.
        mask_BT: bool, False at padding; None if nothing is padded.
    """
    rules.check_is_cache(cache, KVCache)
    check_cache(model.config, model.dtype, cache, cache.keys[0].shape[0], 0)
    seen = cache.mask
    rules.check_prefix(cache, None if seen is None else np.asarray(seen), ids_BT, mask_BT)


def full_mask(mask_BT: Array | None, count: int, cache: KVCache | None) -> Array | None:
    """The mask over everything: what the cache remembers and the new tokens.

    Args:
        mask_BT: bool mask of the new tokens, of the past ones too, or of all slots of the cache;
            None: they are all real.
        count: New tokens T.
        cache: What came before, or None.

    Returns:
        bool (B, T), or (B, S) over all slots of a cache that is not empty; None where nothing is
        padded.
    """
    if mask_BT is None:
        return None if cache is None or cache.is_empty else cache.mask
    if cache is not None and not cache.is_empty:
        before = cache.mask
        if before is None:
            before = jnp.ones((mask_BT.shape[0], cache.max_length), bool)
        start, width = cache.length, mask_BT.shape[1]
        if width != count:
            start, mask_BT = 0, mask_BT | (jnp.arange(width) >= cache.length + count)
        mask_BT = lax.dynamic_update_slice(before, mask_BT, (0, start))
    elif cache is not None:
        mask_BT = mask_BT[:, :count]
    # A mask of ones would only keep the fast causal kernels from running.
    return None if is_known(mask_BT) and bool(mask_BT.all()) else mask_BT


def check_window(config: OPTConfig, mask_BS: Array | None, length: int) -> None:
    """Refuses a sequence that has more tokens than the model has positions.

    Args:
        config: The model's configuration.
        mask_BS: bool, False at padding; None if there is none.
        length: Tokens S in all, padding included.
    """
    if length > config.max_position_embeddings and (mask_BS is None or is_known(mask_BS)):
        longest = length if mask_BS is None else int(np.asarray(mask_BS)[:, :length].sum(1).max())
        rules.check_window(config, longest)


def as_integers(name: str, values: Any) -> Array | None:
    """A 2-D int32 array, or None; where values can be looked at they must be whole and fit."""
    if values is None:
        return None
    array = values if isinstance(values, Array) else as_tensor(name, rules.as_row(name, values))
    is_integer = not jnp.issubdtype(array.dtype, jnp.complexfloating)
    if jnp.issubdtype(array.dtype, jnp.floating) and is_known(array):
        is_integer = bool((array == jnp.round(array)).all())
    rules.check_kind(name, is_integer, array.dtype, array.shape)
    return array.astype(jnp.int32)


def as_tensor(name: str, values: Any) -> Array:
    """Numbers as a JAX array; 64-bit integers beyond int32 are refused, not wrapped."""
    if isinstance(values, Array):
        return values
    try:
        array = np.asarray(values)
        if array.dtype.kind in "iu" and array.size:
            check_ranges([Range(name, array, -(2**31), 2**31 - 1, "int32")])
        return jnp.asarray(array)
    except (TypeError, ValueError, OverflowError) as error:
        if isinstance(error, InputError):
            raise
        raise rules.not_regular(name, error) from None


def check_ranges(ranges: Sequence[Range]) -> None:
    """Refuses values outside of ranges, where they can be looked at."""
    for expected in ranges:
        if is_known(expected.values) and expected.values.size:
            array = np.asarray(expected.values)
            rules.check_range(expected, int(array.min()), int(array.max()))


def is_known(value: Any) -> bool:
    """Whether values can be read now: not while tracing, nor where other hosts hold parts."""
    if isinstance(value, Tracer):
        return False
    return not isinstance(value, Array) or value.is_fully_addressable


def to_tensor(model: Any, values: Any) -> Array:
    """NumPy's values on the device."""
    return jnp.asarray(values)


def to_array(values: Array) -> NDArray[Any]:
    """NumPy's values."""
    return np.asarray(values)
