"""Quantised weights: the layers that hold them, and the products they take part in.

A layer keeps the numbers of `opt_core.quantization`; the compiled program makes the weight they
stand for where it multiplies. That saves memory between the calls, not time. Such a model can only
be run: it has no parameters to train.
"""

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from opt_core.dialects import KERAS
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import GROUP, QuantizedTensor, is_quantized, scheme_of
from opt_tf import _private
from opt_tf.linear import Linear, linear

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel


class QuantizedWeight(keras.layers.Layer):
    """The numbers of a weight (O, I), as in `QuantizedTensor`."""

    def __init__(self, tensor: QuantizedTensor, **options: Any):
        """Makes no variables yet.

        Args:
            tensor: Says of which shapes and types they are (`QuantizedTensor.empty`).
            **options: Keras' own.
        """
        super().__init__(**options)
        self.width, self.zeros = tensor.width, None
        arrays = {"values": tensor.values, "scales": tensor.scales, "zeros": tensor.zeros}
        self.kinds = {k: (v.shape, v.dtype.name) for k, v in arrays.items() if v is not None}

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        self.values, self.scales = self._variable("values"), self._variable("scales")
        if "zeros" in self.kinds:
            self.zeros = self._variable("zeros")

    def _variable(self, name: str) -> keras.Variable:
        shape, dtype = self.kinds[name]
        return self.add_weight(
            shape=shape, initializer="zeros", dtype=dtype, trainable=False, autocast=False,
            name=name,
        )  # fmt: skip

    def dequantize(self, rows: tf.Tensor | None = None) -> tf.Tensor:
        """Rows of the weight, in float32.

        Args:
            rows: Which, by their numbers (of any shape); None for all.
        """

        def some(held: Any) -> Any:
            held = tf.convert_to_tensor(held)
            return held if rows is None else tf.gather(held, rows)

        values, scales = some(self.values), some(self.scales)
        if self.zeros is None:
            return tf.cast(values, tf.float32) * scales[..., None]
        steps = tf.cast(tf.stack((values % 16, values // 16), -1), tf.float32)
        shape = tf.shape(scales)
        steps = tf.reshape(steps, tf.concat((shape, [GROUP]), 0))
        weight = (steps - tf.cast(some(self.zeros), tf.float32)[..., None]) * scales[..., None]
        wide: Any = tf.reshape(weight, tf.concat((shape[:-1], [scales.shape[-1] * GROUP]), 0))
        return wide[..., : self.width]

    def numbers(self) -> QuantizedTensor:
        """The numbers themselves, on the host."""
        zeros = None if self.zeros is None else self.zeros.numpy()
        values, scales = self.values.numpy(), self.scales.numpy()
        return QuantizedTensor.of(values, scales, zeros, self.width)


class QuantizedLinear(keras.layers.Layer):
    """`input @ weight.T + bias`."""

    def __init__(self, weight: QuantizedWeight, bias: bool, **options: Any):
        super().__init__(**options)
        self.weight = weight
        self.use_bias, self.bias = bias, None

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        self.weight.build()
        if self.use_bias:
            shape = self.weight.scales.shape[:1]
            self.bias = self.add_weight(shape=shape, initializer="zeros", name="bias")

    def call(self, input: tf.Tensor) -> tf.Tensor:
        """Computes the product."""
        out = linear(input, tf.cast(self.weight.dequantize(), input.dtype))
        return out if self.bias is None else out + tf.convert_to_tensor(self.bias)


class QuantizedEmbedding(keras.layers.Layer):
    """A table of rows."""

    is_quantized = True
    """The mark that `opt_core.quantization.is_quantized` looks for."""

    def __init__(self, weight: QuantizedWeight, **options: Any):
        super().__init__(**options)
        self.weight = weight

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        self.weight.build()

    def call(self, rows: tf.Tensor) -> tf.Tensor:
        """Looks rows up."""
        return tf.cast(self.weight.dequantize(rows), self.compute_dtype)

    def attend(self, hidden: tf.Tensor) -> tf.Tensor:
        """The product with the table: a tied language-model head."""
        return linear(hidden, tf.cast(self.weight.dequantize(), hidden.dtype))


def prepare(model: "TFOPTPreTrainedModel", quantize: str | None) -> None:
    """Replaces the layers that a quantised model keeps otherwise, before they have variables."""
    for spec in param_specs(model.config, model.head):
        scheme = scheme_of(spec, quantize)
        if scheme is None:
            continue
        parent, name = KERAS.parent(model, spec)
        old = getattr(parent, name)
        if not isinstance(old, QuantizedLinear | QuantizedEmbedding):
            options = {"name": old.name, "dtype": old.dtype_policy}
            weight = QuantizedWeight(
                QuantizedTensor.empty(spec.shape, scheme), name="weight", dtype=old.dtype_policy
            )
            if isinstance(old, Linear):
                new = QuantizedLinear(weight, old.use_bias, **options)
            else:
                new = QuantizedEmbedding(weight, **options)
            _private.replace_layer(parent, name, new)


def set_quantized(model: "TFOPTPreTrainedModel", spec: ParamSpec, tensor: QuantizedTensor) -> None:
    """Gives a quantised weight its numbers.

    Args:
        model: The model.
        spec: The parameter it is.
        tensor: Its numbers.
    """
    parent, name = KERAS.parent(model, spec)
    weight = getattr(parent, name).weight
    weight.values.assign(tf.constant(tensor.values))
    weight.scales.assign(tf.constant(tensor.scales))
    if tensor.zeros is not None:
        weight.zeros.assign(tf.constant(tensor.zeros))


def get_quantized(model: "TFOPTPreTrainedModel", spec: ParamSpec) -> QuantizedWeight | None:
    """The numbers of a parameter; None if it is kept in floating point."""
    if not spec.name.endswith(".weight") or not is_quantized(model):
        return None
    parent, name = KERAS.parent(model, spec)
    weight = getattr(getattr(parent, name), "weight", None)
    return weight if isinstance(weight, QuantizedWeight) else None
