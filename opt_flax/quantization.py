"""Quantised weights: the layers that hold them, and the products they take part in.

A layer keeps the numbers of `opt_core.quantization`; the compiled program makes the weight they
stand for where it multiplies. That saves memory between the calls, not time. Such a model can only
be run: it has no parameters to train, and it stays on one device.
"""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from opt_core.dialects import NNX
from opt_core.params import ParamSpec
from opt_core.quantization import GROUP, QuantizedTensor, is_quantized
from opt_flax.linear import linear

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTPreTrainedModel


class QuantizedWeight(nnx.Module):
    """The numbers of a weight (O, I), as in `QuantizedTensor`."""

    def __init__(self, tensor: QuantizedTensor, dtype: jnp.dtype):
        self.width, self.dtype = tensor.width, dtype
        self.values = nnx.Variable(jnp.asarray(tensor.values))
        self.scales = nnx.Variable(jnp.asarray(tensor.scales))
        self.zeros = None if tensor.zeros is None else nnx.Variable(jnp.asarray(tensor.zeros))

    def dequantize(self, rows: Array | None = None) -> Array:
        """Rows of the weight, in float32.

        Args:
            rows: Which, by their numbers (of any shape); one that there is not reads as NaN.
                None for all.
        """

        def some(held: nnx.Variable[Any]) -> Array:
            return held[...] if rows is None else jnp.take(held[...], rows, axis=0, mode="fill")

        values, scales = some(self.values), some(self.scales)
        if self.zeros is None:
            return values.astype(jnp.float32) * scales[..., None]
        steps = jnp.stack((values & 15, values >> 4), -1).astype(jnp.int8)
        steps = steps.reshape(*scales.shape, GROUP) - some(self.zeros)[..., None].astype(jnp.int8)
        weight = steps.astype(jnp.float32) * scales[..., None]
        return weight.reshape(*scales.shape[:-1], -1)[..., : self.width]

    def numbers(self) -> QuantizedTensor:
        """The numbers themselves, on the host."""
        zeros = None if self.zeros is None else np.asarray(self.zeros[...])
        values, scales = np.asarray(self.values[...]), np.asarray(self.scales[...])
        return QuantizedTensor.of(values, scales, zeros, self.width)


class QuantizedLinear(nnx.Module):
    """`input @ weight.T + bias`."""

    def __init__(self, weight: QuantizedWeight, bias: nnx.Param[Any] | None):
        self.weight = weight
        self.bias = bias

    def __call__(self, input: Array) -> Array:
        """Computes the product."""
        out = linear(input, self.weight.dequantize().astype(input.dtype))
        return out if self.bias is None else out + self.bias[...]


class QuantizedEmbedding(nnx.Module):
    """A table of rows."""

    is_quantized = True
    """The mark that `opt_core.quantization.is_quantized` looks for."""

    def __init__(self, weight: QuantizedWeight):
        self.weight = weight

    def __call__(self, rows: Array) -> Array:
        """Looks rows up."""
        return self.weight.dequantize(rows).astype(self.weight.dtype)

    def attend(self, hidden: Array) -> Array:
        """The product with the table: a tied language-model head."""
        return linear(hidden, self.weight.dequantize().astype(hidden.dtype))


def set_quantized(
    model: "FlaxOPTPreTrainedModel", spec: ParamSpec, tensor: QuantizedTensor, dtype: jnp.dtype
) -> None:
    """Puts a quantised weight in the place of a float one.

    Args:
        model: The model.
        spec: The parameter it is.
        tensor: Its numbers.
        dtype: Type the model computes in.
    """
    parent, name = NNX.parent(model, spec)
    weight = QuantizedWeight(tensor, dtype)
    if spec.kind == "embedding":
        new = QuantizedEmbedding(weight)
    else:
        new = QuantizedLinear(weight, getattr(parent, name).bias)
    setattr(parent, name, new)


def get_quantized(model: "FlaxOPTPreTrainedModel", spec: ParamSpec) -> QuantizedWeight | None:
    """The numbers of a parameter; None if it is kept in floating point."""
    if not spec.name.endswith(".weight") or not is_quantized(model):
        return None
    parent, name = NNX.parent(model, spec)
    weight = getattr(getattr(parent, name), "weight", None)
    return weight if isinstance(weight, QuantizedWeight) else None
