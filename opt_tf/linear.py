"""Linear layers and embeddings: what holds a parameter, and the product it takes part in.

They are Keras' own layers (so LoRA and quantisation apply), their variables made at once and left
zero for `opt_tf.checkpoint` to fill in.
"""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

FEW_ROWS = 64
"""Up to so many rows a product with the table is computed the other way round."""
_PARTS = 2
"""Pieces that a product of one row is computed in: XLA gives each a thread, the whole only one."""


class Linear(keras.layers.Dense):
    """`input @ kernel + bias`; the kernel is [in, out]."""

    def __init__(self, into: int, out: int, bias: bool, **options: Any):
        super().__init__(out, use_bias=bias, kernel_initializer="zeros", **options)
        self.into = into

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        super().build((None, self.into))

    def call(self, inputs: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        """The product with the kernel, plus the bias."""
        is_plain = self.quantization_mode is None and self.compute_dtype == "float32"
        if not (is_plain and inputs.shape[:-1].num_elements() == 1 and self.into % _PARTS == 0):
            plain: Any = super().call(inputs, training=training)
            return plain
        pieces = tf.reshape(inputs, (_PARTS, 1, -1))
        kernel = tf.reshape(self.kernel, (_PARTS, -1, self.units))
        product = tf.reduce_sum(tf.matmul(pieces, kernel), 0)
        if self.bias is not None:
            product = product + self.bias
        return tf.reshape(product, (*sizes(inputs)[:-1], self.units))


class Embedding(keras.layers.Embedding):
    """A table of rows."""

    def __init__(self, rows: int, width: int, padding: int | None = None, **options: Any):
        super().__init__(rows, width, embeddings_initializer="zeros", **options)
        self.padding = padding

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        """Looks rows up; the padding row gets no gradient here, as in PyTorch's `padding_idx`."""
        table: Any = tf.convert_to_tensor(self.embeddings)
        found = tf.cast(_lookup(table, rows, self.padding), self.compute_dtype)
        if tf.is_symbolic_tensor(rows):
            # Inside a program nothing could be checked, and XLA and GPUs read some other row.
            is_row = (rows >= 0) & (rows < table.shape[0])
            found = tf.where(tf.expand_dims(is_row, -1), found, tf.cast(np.nan, found.dtype))
        return found

    def attend(self, hidden: tf.Tensor) -> tf.Tensor:
        """The product with the table: a tied language-model head."""
        table = tf.cast(self.embeddings, hidden.dtype)
        *outer, P = sizes(hidden)
        rows = tf.reshape(hidden, (-1, P))
        count = sizes(rows)[0]
        if isinstance(count, int) and count <= FEW_ROWS:
            # On the CPU, XLA reads a transposed table at a tenth of the rate for a few rows.
            logits = tf.transpose(tf.matmul(table, rows, transpose_b=True))
        else:
            logits = tf.matmul(rows, table, transpose_b=True)
        return tf.reshape(logits, (*outer, sizes(table)[0]))


def _lookup(table: tf.Tensor, rows: tf.Tensor, padding: int | None) -> tf.Tensor:
    """`tf.gather` with a dense gradient: Keras takes norms of sparse ones row by row."""

    @tf.custom_gradient
    def look_up(table: tf.Tensor) -> Any:
        def backward(upstream: tf.Tensor) -> Any:
            if padding is not None:
                is_padding = tf.expand_dims(rows == padding, -1)
                upstream = tf.where(is_padding, tf.zeros((), upstream.dtype), upstream)
            return tf.math.unsorted_segment_sum(upstream, rows, table.shape[0])

        return tf.gather(table, rows), backward

    return look_up(table)


def sizes(tensor: tf.Tensor) -> tuple[Any, ...]:
    """The tensor's shape: numbers, and scalar tensors for what is known only when it is run."""
    return tuple(keras.ops.shape(tensor) or ())


def drop(values: tf.Tensor, rate: float, seed: tf.Tensor | None) -> tf.Tensor:
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
