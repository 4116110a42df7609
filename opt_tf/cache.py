"""The key-value cache: buffers of a fixed size, and positions that follow from what they hold."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import keras
import tensorflow as tf

from opt_core import inputs as rules
from opt_core.compatibility.caches import CacheMixin
from opt_core.config import OPTConfig
from opt_core.params import POSITION_OFFSET
from opt_tf.linear import sizes


@dataclass(frozen=True, repr=False)
class KVCache(CacheMixin):
    """Keys and values of the tokens seen so far.

    A cache is a value: writing gives new buffers (within a compiled program XLA writes in place),
    so one cache may be continued in several ways.

    Attributes:
        keys: One (B, H, S, K) buffer per layer.
        values: One (B, H, S, K) buffer per layer.
        length: Slots filled; a number, or a scalar int32 tensor inside a compiled program.
        mask: (B, S) bool, False where a slot holds padding; None while no padding was seen.
        grows: Whether it is made larger where it is full; one of `init_cache` is not.
    """

    keys: tuple[tf.Tensor, ...] = ()
    values: tuple[tf.Tensor, ...] = ()
    length: int | tf.Tensor = 0
    mask: tf.Tensor | None = None
    grows: bool = False

    @property
    def max_length(self) -> int:
        """Slots S there are."""
        return sizes(self.keys[0])[2] if self.keys else 0

    @property
    def is_empty(self) -> bool:
        """Whether it is known to hold nothing yet."""
        return isinstance(self.length, int) and self.length == 0

    @property
    def known_length(self) -> int | None:
        """Slots filled, where that can be read now."""
        return None if tf.is_symbolic_tensor(self.length) else int(self.length)

    def write(
        self, layer: int, key_BHTK: tf.Tensor, value_BHTK: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Stores one layer's new keys and values behind the present ones.

        Returns:
            The layer's buffers (B, H, S, K) with them.
        """
        if not self.keys:  # nothing is copied before something follows
            return key_BHTK, value_BHTK
        return self._put(self.keys[layer], key_BHTK), self._put(self.values[layer], value_BHTK)

    def _put(self, buffer: tf.Tensor, new_BHTK: tf.Tensor) -> tf.Tensor:
        write: Any = keras.ops.slice_update
        if buffer.shape[0] != 1:
            return write(buffer, (0, 0, self.length, 0), new_BHTK)
        buffer, new = tf.squeeze(buffer, 0), tf.squeeze(new_BHTK, 0)  # as in `squeezed`
        return tf.expand_dims(write(buffer, (0, self.length, 0), new), 0)

    def squeezed(self) -> "KVCache":
        """The same without the axis of a single row, as a compiled loop had better carry it.

        XLA leaves that axis out of attention's products. A loop that has it copies every buffer
        twice in each step: for the products, and for the next step.
        """
        is_single = self.keys[0].shape[0] == 1
        return self._each(lambda buffer: tf.squeeze(buffer, 0)) if is_single else self

    def unsqueezed(self) -> "KVCache":
        """The cache that `squeezed` was made of."""
        is_squeezed = len(self.keys[0].shape) == 3
        return self._each(lambda buffer: tf.expand_dims(buffer, 0)) if is_squeezed else self

    def _each(self, change: Callable[[tf.Tensor], tf.Tensor]) -> "KVCache":
        keys, values = tuple(map(change, self.keys)), tuple(map(change, self.values))
        return replace(self, keys=keys, values=values)

    def visible(self, count: int) -> int:
        """Slots to look at with `count` new tokens: the filled ones, or all where unknown."""
        return self.filled(count)

    def filled(self, count: int) -> int:
        """Slots filled once `count` more tokens are in, as far as that is known."""
        return self.length + count if isinstance(self.length, int) else self.max_length

    def advance(
        self,
        count: int,
        mask_BS: tf.Tensor | None,
        keys: tuple[tf.Tensor, ...],
        values: tuple[tf.Tensor, ...],
    ) -> "KVCache":
        """The cache after `count` more tokens.

        Args:
            count: New tokens T.
            mask_BS: bool, False at padding, for the visible slots; None: as this cache knows it,
                no new token is padding.
            keys: The buffers that `write` returned.
            values: The buffers that `write` returned.
        """
        if not self.keys:
            return KVCache(keys, values, count, mask_BS, grows=True)
        if mask_BS is not None:
            free = [[0, 0], [0, self.max_length - self.visible(count)]]
            mask_BS = tf.pad(mask_BS, free, constant_values=True)
        mask = self.mask if mask_BS is None else mask_BS
        return replace(self, keys=keys, values=values, length=self.length + count, mask=mask)

    def crop(self, length: int) -> "KVCache":
        """Goes back to the first `length` slots: what is behind them is overwritten.

        Args:
            length: How many; less than 0: so many are given up.

        Returns:
            The cache that goes on; this one stays as it is.

        Raises:
            InputError: There are not so many.
        """
        length = rules.cropped_length(length, self.known_length)
        mask = self.mask
        if mask is not None:
            mask = mask | (tf.range(self.max_length) >= length)
        return replace(self, length=length, mask=mask)

    def resize(self, rows: int, max_length: int) -> "KVCache":
        """A cache of other buffers that holds the same, so that one prompt can have many endings.

        Args:
            rows: Rows B of it; a cache of one row is repeated.
            max_length: Slots S of it, enough for what there is.

        Raises:
            InputError: The rows or the slots do not fit.
        """
        rules.check_resize(self.keys[0].shape[0], self.known_length, rows, max_length)
        count = min(max_length, self.max_length)

        def copy(old: Any, slots: int, value: Any) -> Any:
            free = [[0, 0] for _ in old.shape]
            free[slots][1] = max_length - count
            kept = old[:, :, :count] if slots == 2 else old[:, :count]
            new = tf.pad(kept, free, constant_values=value)
            return new if sizes(old)[0] == rows else tf.repeat(new, rows, 0)

        return replace(
            self,
            keys=tuple(copy(buffer, 2, 0) for buffer in self.keys),
            values=tuple(copy(buffer, 2, 0) for buffer in self.values),
            mask=None if self.mask is None else copy(self.mask, 1, True),
            grows=False,
        )

    def select(self, rows: tf.Tensor) -> "KVCache":
        """The cache of other rows: `rows[i]` becomes row i.

        Args:
            rows: (any,) integer row numbers.
        """
        mask = None if self.mask is None else tf.gather(self.mask, rows)
        return replace(self._each(lambda buffer: tf.gather(buffer, rows)), mask=mask)

    # What lets caches go in and out of a tf.function.
    def __tf_flatten__(self) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        if isinstance(self.length, int):
            return (self.grows, self.length), (self.keys, self.values, self.mask)
        return (self.grows,), (self.keys, self.values, self.mask, self.length)

    @classmethod
    def __tf_unflatten__(cls, metadata: tuple[Any, ...], components: tuple[Any, ...]) -> "KVCache":
        (grows, *known), (keys, values, mask, *length) = metadata, components
        (length,) = (*known, *length)
        return cls(keys, values, length, mask, grows)


def init_cache(config: OPTConfig, batch_size: int, max_length: int, dtype: str) -> KVCache:
    """An empty cache.

    Args:
        config: The model's configuration.
        batch_size: Rows B.
        max_length: Slots S, for the prompt and everything after it.
        dtype: Type of the keys and values: the one the model computes in.
    """
    rules.check_cache_size(batch_size if isinstance(batch_size, int) else None, max_length)
    shape = (batch_size, config.num_attention_heads, max_length, config.head_dim)
    layers = range(config.num_hidden_layers)
    return KVCache(
        tuple(tf.zeros(shape, dtype) for _ in layers),
        tuple(tf.zeros(shape, dtype) for _ in layers),
    )


def position_rows(mask_BS: tf.Tensor | None, past: int | tf.Tensor, count: int) -> tf.Tensor:
    """Rows of the position table for the newest tokens.

    A token's position is the number of real tokens before it, so padding never shifts one; a padded
    token reads row 1 (transformers' `cumsum(mask) * mask - 1 + 2`).

    Args:
        mask_BS: bool (B, S), False at padding; None if there is none.
        past: Tokens already in the cache.
        count: New tokens T.

    Returns:
        Row numbers (B, T), or (1, T) without a mask.
    """
    newest = past + tf.range(count)
    if mask_BS is None:
        return newest[None] + POSITION_OFFSET
    real = tf.cast(mask_BS, tf.int32)
    # A gather, not a slice: XLA would compile a slice anew for every value of `past`.
    return tf.gather(tf.cumsum(real, 1) * real, newest, axis=1) - 1 + POSITION_OFFSET
