"""Caches whose buffers are variables: XLA writes those in place.

What goes into a program and comes out of it would be copied. The variables are the same for all
widths, for what a program is traced with stays in memory as long as the program.
"""

from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from opt_tf.cache import KVCache
from opt_tf.linear import sizes


def make_variables(buffers: Any) -> Any:
    """Variables that hold buffers (B, H, S, K), of any number of slots S."""

    def make(buffer: tf.Tensor) -> tf.Variable:
        B, H, _, K = buffer.shape
        return tf.Variable(buffer, trainable=False, shape=(B, H, None, K))

    return tf.nest.map_structure(make, buffers)


def contents(buffer: tf.Variable, width: int) -> tf.Tensor:
    """The tensor in a variable that has so many slots now."""
    value = buffer.read_value()
    value.set_shape((None, None, width, None))
    return value


@dataclass(frozen=True, repr=False)
class VariableCache(KVCache):
    """A cache that is written in place.

    Attributes:
        width: Slots S there are.
    """

    width: int = 0

    @property
    def max_length(self) -> int:
        """Slots S there are."""
        return self.width


@dataclass(frozen=True, repr=False)
class RowsCache(VariableCache):
    """A cache whose rows are written at places of their own, one token each.

    Attributes:
        places: (B,) the slot of each row's new token.
    """

    places: tf.Tensor | None = None

    def _put(self, buffer: Any, new_BHTK: tf.Tensor) -> tf.Tensor:
        assert self.places is not None
        value = contents(buffer, self.width)
        is_here = tf.range(self.width) == tf.reshape(self.places, (sizes(value)[0], 1))
        written = tf.where(is_here[:, None, :, None], new_BHTK, value)
        buffer.assign(written)
        return written


@dataclass(frozen=True, repr=False)
class RowCache(VariableCache):
    """One row of a cache of several.

    It is written before it is taken out: XLA would copy all of a variable that is read first.

    Attributes:
        row: Its number, a scalar.
    """

    row: tf.Tensor | None = None

    def _put(self, buffer: Any, new_BHTK: tf.Tensor) -> tf.Tensor:
        assert self.row is not None
        write, value = keras.ops.slice_update, contents(buffer, self.width)
        written: Any = write(value, (self.row, 0, self.length, 0), new_BHTK)
        buffer.assign(written)
        return tf.gather(written, self.row[None])
