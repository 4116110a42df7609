"""Model inputs: made into tensors and checked before anything is computed."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_tf.cache import KVCache
from opt_tf.linear import sizes


def check_inputs(
    config: OPTConfig,
    dtype: str,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    cache: KVCache | None,
) -> tuple[tf.Tensor | None, tf.Tensor | None, tf.Tensor | None, tf.Tensor | None]:
    """Turns arrays and lists into tensors and checks shapes and ranges.

    Args:
        config: The model's configuration.
        dtype: Type the model computes in.
        input_ids: (B, T) ids, or None.
        attention_mask: (B, T) or (B, past + T), or None.
        position_ids: (B, T), or None.
        inputs_embeds: (B, T, P), or None.
        cache: What came before, or None.

    Returns:
        The four inputs as tensors or None, integers as int32 and the mask as bool.

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
        inputs_embeds = tf.cast(as_tensor("inputs_embeds", inputs_embeds), dtype)
        if inputs_embeds.shape.rank != 3 or inputs_embeds.shape[2] != config.embed_dim:
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
        if not any(positions.shape.is_compatible_with((rows, T)) for rows in (1, B)):
            raise InputError(
                f"position_ids: expected shape ({B}, {T}), received {tuple(positions.shape)}"
            )
        window = config.max_position_embeddings
        check_range("position_ids", positions, -1, window - 1, f"max_position_embeddings={window}")
    mask = as_integers("attention_mask", attention_mask)
    if mask is not None:
        slots = T if cache is None or T is None else cache.filled(T)
        if not any(mask.shape.is_compatible_with((B, width)) for width in (T, slots)):
            raise InputError(
                f"attention_mask: expected shape ({B}, {T})"
                + (f" or ({B}, {slots})" if slots != T else "")
                + f", received {tuple(mask.shape)}"
            )
        check_range("attention_mask", mask, 0, 1, "1 for tokens and 0 for padding")
    if cache is not None:
        check_cache(config, dtype, cache, B, T)
    ids, positions = (None if x is None else tf.cast(x, tf.int32) for x in (ids, positions))
    return ids, None if mask is None else tf.cast(mask, tf.bool), positions, inputs_embeds


def check_cache(
    config: OPTConfig, dtype: str, cache: KVCache, rows: int | None, count: int | None
) -> None:
    """Refuses a cache that another model made, or that is too small.

    Args:
        config: The model's configuration.
        dtype: Type the model computes in.
        cache: The cache.
        rows: Rows B of the input; None while tracing for any number.
        count: New tokens T; None while tracing for any number.
    """
    keys = cache.keys[0]
    made = (len(cache.keys), keys.shape[1], keys.shape[3], keys.dtype.name)
    expected = (config.num_hidden_layers, config.num_attention_heads, config.head_dim, dtype)
    if made != expected:
        raise InputError(
            "past_key_values is of another model: expected (layers, heads, head size, dtype) "
            f"{expected}, received {made}"
        )
    if None not in (rows, keys.shape[0]) and keys.shape[0] != rows:
        raise InputError(f"past_key_values holds {keys.shape[0]} rows, the input has {rows}")
    taken = int(cache.length) if is_known(cache.length) else 0
    if count is not None and cache.max_length is not None and taken + count > cache.max_length:
        raise InputError(
            f"past_key_values has {cache.max_length} slots; "
            f"{taken} are taken and {count} more are needed"
        )


def check_prefix(config: OPTConfig, dtype: str, cache: Any, ids_BT: Any, mask_BT: Any) -> None:
    """Refuses a cache that cannot hold the beginning of some prompts.

    Args:
        config: The model's configuration.
        dtype: Type the model computes in.
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
    seen = before if cache.mask is None else cache.mask.numpy()[:, :used]
    given = before if mask_BT is None else mask_BT[:, :used]
    if (seen != given).any():
        raise InputError("attention_mask and past_key_values disagree about where padding is")


def full_mask(mask_BT: tf.Tensor | None, count: int, cache: KVCache | None) -> tf.Tensor | None:
    """The mask over everything: what the cache remembers and the new tokens.

    Args:
        mask_BT: bool mask of the new tokens, or of the past ones too; None: they are all real.
        count: New tokens T.
        cache: What came before, or None.

    Returns:
        bool (B, S), S the slots the new tokens may look at, or None where nothing is padded.
    """
    slots = count if cache is None else cache.visible(count)
    if mask_BT is None:
        return None if cache is None or cache.mask is None else cache.mask[:, :slots]
    if cache is not None and not cache.is_empty and mask_BT.shape[1] == count:
        before = cache.mask
        if before is None:
            before = tf.ones((sizes(mask_BT)[0], cache.max_length), tf.bool)
        start: Any = (0, cache.length)
        whole: Any = keras.ops.slice_update(before, start, mask_BT)
        mask_BT = whole[:, :slots]
    # A mask of ones would only make work.
    return None if is_known(mask_BT) and bool(tf.reduce_all(mask_BT)) else mask_BT


def check_window(config: OPTConfig, mask_BS: tf.Tensor | None, length: int) -> None:
    """Refuses a sequence that has more tokens than the model has positions.

    Args:
        config: The model's configuration.
        mask_BS: bool, False at padding; None if there is none.
        length: Tokens S in all, padding included.
    """
    window = config.max_position_embeddings
    if not is_known(length) or length <= window or (mask_BS is not None and not is_known(mask_BS)):
        return
    longest = length
    if mask_BS is not None:
        longest = int(tf.reduce_max(tf.reduce_sum(tf.cast(mask_BS, tf.int32), 1)))
    if longest > window:
        raise InputError(f"a sequence of {longest} tokens exceeds max_position_embeddings={window}")


def as_integers(name: str, values: Any) -> tf.Tensor | None:
    """A 2-D tensor of integers, or None."""
    if values is None:
        return None
    tensor = as_tensor(name, values)
    if not (tensor.dtype.is_integer or tensor.dtype.is_bool) or tensor.shape.rank != 2:
        raise InputError(
            f"{name}: expected integers of shape (B, T), "
            f"received {tensor.dtype.name} of shape {tuple(tensor.shape)}"
        )
    return tensor


def as_tensor(name: str, values: Any) -> tf.Tensor:
    """Numbers as a tensor."""
    try:
        tensor = tf.convert_to_tensor(values)
    except (TypeError, ValueError, OverflowError, tf.errors.OpError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name}: expected numbers in a regular shape: {reason}") from None
    if not (tensor.dtype.is_integer or tensor.dtype.is_floating or tensor.dtype.is_bool):
        raise InputError(f"{name}: expected numbers, received {tensor.dtype.name}")
    return tensor


def check_range(name: str, values: tf.Tensor, low: int, high: int, why: str) -> None:
    """Refuses values outside low..high, where they can be looked at."""
    if not is_known(values) or 0 in values.shape:
        return
    array = values.numpy()
    least, most = int(array.min()), int(array.max())
    if least < low or most > high:
        raise InputError(
            f"{name}: expected values in {low}..{high} ({why}), received {least}..{most}"
        )


def is_known(value: Any) -> bool:
    """Whether a value can be read now: not while a tf.function is traced."""
    return not tf.is_symbolic_tensor(value) if tf.is_tensor(value) else value is not None
