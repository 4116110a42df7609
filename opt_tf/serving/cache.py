"""Caches whose buffers are variables, for XLA to write in place."""

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from opt_tf.cache import KVCache
from opt_tf.linear import sizes


@dataclass(frozen=True, repr=False)
class RowsCache(KVCache):
    """A cache whose rows are written at places of their own, one token each.

    Attributes:
        places: (B,) the slot of each row's new token.
    """

    places: tf.Tensor | None = None

    def _put(self, buffer: Any, new_BHTK: tf.Tensor) -> tf.Tensor:
        assert self.places is not None
        B, _, S, _ = sizes(buffer)
        is_here = tf.range(S) == tf.reshape(self.places, (B, 1))
        written = tf.where(is_here[:, None, :, None], new_BHTK, buffer)
        buffer.assign(written)
        return written


@dataclass(frozen=True, repr=False)
class RowCache(KVCache):
    """One row of a cache of several.

    It is written before it is taken out: XLA would copy all of a variable that is read first.

    Attributes:
        row: Its number, a scalar.
    """

    row: tf.Tensor | None = None

    def _put(self, buffer: Any, new_BHTK: tf.Tensor) -> tf.Tensor:
        assert self.row is not None
        write: Any = keras.ops.slice_update
        written = write(buffer, (self.row, 0, self.length, 0), new_BHTK)
        buffer.assign(written)
        return tf.gather(written, self.row[None])
