"""Model inputs: made into tensors and checked before anything is computed."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf
from numpy.typing import NDArray

from opt_core import inputs as rules
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.generation.request import Ids, Mask
from opt_core.inputs import Range
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
) -> tuple[tf.Tensor | None, tf.Tensor | None, tf.Tensor | None, tf.Tensor | None, KVCache | None]:
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
        The four inputs as tensors or None, integers as int32 and the mask as bool, and the cache
        with room for them.

    Raises:
        InputError: What does not fit, expected and received.
    """
    ids = as_integers("input_ids", input_ids)
    mask = as_integers("attention_mask", attention_mask)
    positions = as_integers("position_ids", position_ids)
    embeds: Any = None
    if inputs_embeds is not None:
        embeds = tf.cast(as_tensor("inputs_embeds", inputs_embeds), dtype)
    given = ids, mask, positions, embeds
    B, T = rules.check_inputs(config, *given, cache, check_ranges)
    if cache is not None:
        check_cache(config, dtype, cache, B, T)
        cache = cache.with_room(T)
    ids, positions = (None if x is None else tf.cast(x, tf.int32) for x in (ids, positions))
    return ids, None if mask is None else tf.cast(mask, tf.bool), positions, embeds, cache


def check_prompts(model: Any, input_ids: Any, attention_mask: Any) -> tuple[Ids, Mask | None]:
    """Checks prompts, (B, T); the ids and their mask, or None, in NumPy."""
    ids, mask, *_ = check_inputs(
        model.config, model.compute_dtype, input_ids, attention_mask, None, None, None
    )
    assert ids is not None
    return ids.numpy(), None if mask is None else mask.numpy()


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
    rules.check_cache(config, dtype, cache, lambda keys: keys.dtype.name, rows, count)


def check_prefix(model: Any, cache: Any, ids_BT: Ids, mask_BT: Mask | None) -> None:
    """Refuses a cache that cannot hold the beginning of some prompts.

    Args:
        model: The language model.
        cache: What the caller passed as `past_key_values`.
        ids_BT: The whole prompts.
        mask_BT: bool, False at padding; None if nothing is padded.
    """
    rules.check_is_cache(cache, KVCache)
    check_cache(model.config, model.compute_dtype, cache, cache.keys[0].shape[0], 0)
    seen = cache.mask
    rules.check_prefix(cache, None if seen is None else seen.numpy(), ids_BT, mask_BT)


def full_mask(mask_BT: tf.Tensor | None, count: int, cache: KVCache | None) -> tf.Tensor | None:
    """The mask over everything: what the cache remembers and the new tokens.

    Args:
        mask_BT: bool mask of the new tokens, of the past ones too, or of all slots of the cache;
            None: they are all real.
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
    elif cache is not None:
        mask_BT = mask_BT[:, :slots]
        if not is_known(cache.length):
            mask_BT = mask_BT | (tf.range(slots) >= cache.length + count)
    # A mask of ones would only make work.
    return None if is_known(mask_BT) and bool(tf.reduce_all(mask_BT)) else mask_BT


def check_window(config: OPTConfig, mask_BS: tf.Tensor | None, length: int) -> None:
    """Refuses a sequence that has more tokens than the model has positions.

    Args:
        config: The model's configuration.
        mask_BS: bool, False at padding; None if there is none.
        length: Tokens S in all, padding included.
    """
    if is_known(length) and length > config.max_position_embeddings:
        if mask_BS is None:
            rules.check_window(config, int(length))
        elif is_known(mask_BS):
            counts = tf.reduce_sum(tf.cast(mask_BS, tf.int32), 1)
            rules.check_window(config, int(tf.reduce_max(counts)))


def as_integers(name: str, values: Any) -> tf.Tensor | None:
    """A 2-D tensor of integers, or None; floats must be whole numbers."""
    if values is None:
        return None
    tensor = as_tensor(name, rules.as_row(name, values))
    is_integer = not tensor.dtype.is_floating or not is_known(tensor)
    if not is_integer:
        is_integer = bool(tf.reduce_all(tensor == tf.round(tensor)))
    rules.check_kind(name, is_integer, tensor.dtype.name, tuple(tensor.shape))
    return tensor


def as_tensor(name: str, values: Any) -> tf.Tensor:
    """Numbers as a tensor."""
    try:
        tensor = tf.convert_to_tensor(rules.as_array(values))
    except (TypeError, ValueError, OverflowError, tf.errors.OpError) as error:
        raise rules.not_regular(name, error) from None
    if not (tensor.dtype.is_integer or tensor.dtype.is_floating or tensor.dtype.is_bool):
        hint = f"; {rules.NO_TEXT}" if tensor.dtype == tf.string else ""
        raise InputError(f"{name}: expected numbers, received {tensor.dtype.name}{hint}")
    return tensor


def check_ranges(ranges: Sequence[Range]) -> None:
    """Refuses values outside of ranges, where they can be looked at."""
    for expected in ranges:
        if is_known(expected.values) and 0 not in expected.values.shape:
            array = expected.values.numpy()
            rules.check_range(expected, int(array.min()), int(array.max()))


def is_known(value: Any) -> bool:
    """Whether a value can be read now: not while a tf.function is traced."""
    return not tf.is_symbolic_tensor(value) if tf.is_tensor(value) else value is not None


def to_tensor(model: Any, values: Any) -> tf.Tensor:
    """NumPy's values as a tensor."""
    return tf.convert_to_tensor(values)


def to_array(values: tf.Tensor) -> NDArray[Any]:
    """NumPy's values."""
    return values.numpy()
