"""Linear layers and embeddings: what holds a parameter, and the product it takes part in.

Their variables are made at once and left zero for `opt_tf.checkpoint` to fill in. A weight is kept
as [out, in], as in the checkpoints and not as in Keras: XLA multiplies a few rows twice as fast so
on the CPU, and many rows no slower.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_core.compatibility.refusals import refuse_attributes

FEW_ROWS = 64
"""Up to so many rows a product is computed in parts."""
_PARTS = (8, 4, 2)
"""Parts of such a product: the most that divide the weight evenly."""
_MULTIPLE = 8
"""More than half as many rows are filled up to a multiple: others cost XLA up to twice the time."""


class Linear(keras.layers.Layer):
    """`input @ weight.T + bias`."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, **options: Any):
        super().__init__(**options)
        self.in_features, self.out_features, self.use_bias = in_features, out_features, bias
        self.bias = None

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        shape = (self.out_features, self.in_features)
        self.weight = self.add_weight(shape, "zeros", name="weight")
        if self.use_bias:
            self.bias = self.add_weight(shape[:1], "zeros", name="bias")

    def call(self, input: tf.Tensor) -> tf.Tensor:
        """Computes the product."""
        out = linear(input, tf.convert_to_tensor(self.weight))
        return out if self.bias is None else out + tf.convert_to_tensor(self.bias)


refuse_attributes(Linear, {"kernel": "use weight, which is [out, in], as in PyTorch"})


class Embedding(keras.layers.Embedding):
    """A table of rows."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        **options: Any,
    ):
        super().__init__(num_embeddings, embedding_dim, embeddings_initializer="zeros", **options)
        self.padding_idx = padding_idx

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        """Looks rows up; the padding row gets no gradient here, as in PyTorch's `padding_idx`."""
        table: Any = tf.convert_to_tensor(self.embeddings)
        found = tf.cast(_lookup(table, rows, self.padding_idx), self.compute_dtype)
        if tf.is_symbolic_tensor(rows):
            # Inside a program nothing could be checked, and XLA and GPUs read some other row.
            is_row = (rows >= 0) & (rows < table.shape[0])
            found = tf.where(tf.expand_dims(is_row, -1), found, tf.cast(np.nan, found.dtype))
        return found

    def attend(self, hidden: tf.Tensor) -> tf.Tensor:
        """The product with the table: a tied language-model head."""
        return linear(hidden, tf.cast(self.embeddings, hidden.dtype))


def linear(input: tf.Tensor, weight: tf.Tensor) -> tf.Tensor:
    """`input @ weight.T`, in the form that XLA is fastest at on the CPU.

    Args:
        input: (..., I).
        weight: (O, I).
    """
    *outer, width = sizes(input)
    rows = tf.reshape(input, (-1, width))
    count, out = sizes(rows)[0], sizes(weight)[0]
    parts = next((parts for parts in _PARTS if out % parts == 0), 1)
    if isinstance(count, int) and count <= FEW_ROWS and rows.dtype == tf.float32 and parts > 1:
        # Each part gets a thread of its own; threads that share a product spend more time on
        # copies of the weight than on the product.
        pieces = tf.reshape(weight, (parts, -1, width))
        filled = -(-count // _MULTIPLE) * _MULTIPLE if 2 * count > _MULTIPLE else count
        rows = tf.pad(rows, [[0, filled - count], [0, 0]])
        each = tf.matmul(pieces, tf.broadcast_to(rows, (parts, filled, width)), transpose_b=True)
        columns = tf.reshape(each, (out, filled))[:, :count]
    else:
        columns = tf.matmul(weight, rows, transpose_b=True)
    return tf.reshape(tf.transpose(columns), (*outer, out))


def _lookup(table: tf.Tensor, rows: tf.Tensor, padding_idx: int | None) -> tf.Tensor:
    """`tf.gather` with a dense gradient: Keras takes norms of sparse ones row by row."""

    @tf.custom_gradient
    def look_up(table: tf.Tensor) -> Any:
        def backward(upstream: tf.Tensor) -> Any:
            if padding_idx is not None:
                is_padding = tf.expand_dims(rows == padding_idx, -1)
                upstream = tf.where(is_padding, tf.zeros((), upstream.dtype), upstream)
            return tf.math.unsorted_segment_sum(upstream, rows, table.shape[0])

        return tf.gather(table, rows), backward

    return look_up(table)


def sizes(tensor: tf.Tensor) -> tuple[Any, ...]:
    """A tensor's shape: numbers, and scalar tensors for what is known only when it is run."""
    return tuple(keras.ops.shape(tensor) or ())


def apply_dropout(values: tf.Tensor, rate: float, seed: tf.Tensor | None) -> tf.Tensor:
    """Dropout: zeroes a share of the values and scales up the others; none without a seed.

    Args:
        values: Any float tensor.
        rate: The share.
        seed: int32 (2,). The same one drops the same values, also when they are computed again.
    """
    if seed is None or rate == 0:
        return values
    kept = tf.random.stateless_uniform(tf.shape(values), seed) >= rate
    return tf.where(kept, values / (1 - rate), tf.zeros_like(values))
