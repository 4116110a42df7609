"""Quantised weights: the layers that hold them, and the products they take part in.

A layer keeps the numbers of `opt_core.quantization`; the compiled program makes the weight they
stand for where it multiplies. That saves memory between the calls, not time. Such a model can only
be run: it has no parameters to train, and none to save but in Keras' own files.
"""

from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from opt_core.dialects import KERAS
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import GROUP, QuantizedTensor, scheme_of
from opt_tf.linear import Linear, linear

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel


class QuantizedWeight(keras.layers.Layer):
    """The numbers of a weight [out, in], as in `QuantizedTensor`."""

    def __init__(self, scheme: str, rows: int, width: int, **options: Any):
        super().__init__(**options)
        self.scheme, self.rows, self.width = scheme, rows, width
        self.zeros = None

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        groups = -(-self.width // GROUP)
        if self.scheme == "int8":
            self.values = self._variable("values", (self.rows, self.width), "int8")
            self.scales = self._variable("scales", (self.rows,), "float32")
        else:
            self.values = self._variable("values", (self.rows, groups * GROUP // 2), "uint8")
            self.scales = self._variable("scales", (self.rows, groups), "float32")
            self.zeros = self._variable("zeros", (self.rows, groups), "uint8")

    def _variable(self, name: str, shape: tuple[int, ...], dtype: str) -> keras.Variable:
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


class QuantizedLinear(keras.layers.Layer):
    """`input @ weight.T + bias`."""

    def __init__(self, scheme: str, into: int, out: int, bias: bool, **options: Any):
        super().__init__(**options)
        self.weight = QuantizedWeight(scheme, out, into, name="weight", dtype=self.dtype_policy)
        self.out, self.use_bias, self.bias = out, bias, None

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        self.weight.build()
        if self.use_bias:
            self.bias = self.add_weight(shape=(self.out,), initializer="zeros", name="bias")

    def call(self, input: tf.Tensor) -> tf.Tensor:
        """Computes the product."""
        out = linear(input, tf.cast(self.weight.dequantize(), input.dtype))
        return out if self.bias is None else out + tf.convert_to_tensor(self.bias)


class QuantizedEmbedding(keras.layers.Layer):
    """A table of rows."""

    def __init__(self, scheme: str, rows: int, width: int, **options: Any):
        super().__init__(**options)
        self.weight = QuantizedWeight(scheme, rows, width, name="weight", dtype=self.dtype_policy)

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
            parent._tracker.untrack(old)
            out, into = spec.shape
            options = {"name": old.name, "dtype": old.dtype_policy}
            if isinstance(old, Linear):
                new = QuantizedLinear(scheme, into, out, old.use_bias, **options)
            else:
                new = QuantizedEmbedding(scheme, out, into, **options)
            setattr(parent, name, new)


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


def is_quantized(model: "TFOPTPreTrainedModel") -> bool:
    """Whether a model was loaded with `quantize`."""
    return isinstance(model.get_decoder().embed_tokens, QuantizedEmbedding)


def check_not_quantized(model: "TFOPTPreTrainedModel", action: str) -> None:
    """Refuses what quantised weights cannot do.

    Raises:
        ConfigError: The model is quantised.
    """
    if is_quantized(model):
        raise ConfigError(
            f"{action}: a model with quantised weights can only be run; load it without quantize"
        )
