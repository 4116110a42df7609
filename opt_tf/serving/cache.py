"""A cache whose rows are written at places of their own."""

from dataclasses import dataclass

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

    def _put(self, buffer: tf.Tensor, new_BHTK: tf.Tensor) -> tf.Tensor:
        assert self.places is not None
        B, _, S, _ = sizes(buffer)
        is_here = tf.range(S) == tf.reshape(self.places, (B, 1))
        return tf.where(is_here[:, None, :, None], new_BHTK, buffer)
