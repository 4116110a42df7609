"""Quantised weights: the layers that hold them, and the products they take part in.

A layer keeps the numbers of `opt_core.quantization`. There are two ways to compute with them:

- With the weight they stand for, a part of it at a time: no whole weight is ever there in floating
  point. That saves memory, not time.
- On the CPU, where PyTorch is built with the kernels, in the order these read (`int8`, `int4`):
  faster than floating point, and rounded more. Layers with one input share one product.

Such a model can only be run: it has no parameters to train.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_core.dialects import TORCH
from opt_core.params import ParamSpec
from opt_core.quantization import GROUP, QuantizedTensor, is_quantized
from opt_torch import _private
from opt_torch.int4 import Int4Order, block_rows
from opt_torch.int8 import Int8Order
from opt_torch.linear import (
    apply_linear,
    has_custom_call,
    is_eager,
    make_linear,
    product_dtype,
)

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel

_PART = 1 << 19
"""Weights that are widened at once on the CPU: 2 MiB as float32, which its caches hold."""
_LARGE_PART = 1 << 22
"""The same on another device: 16 MiB."""
_CPU = torch.device("cpu")
_ROW = torch.ones(1, 1)


class _Packed(NamedTuple):
    """The place of a weight in a kernel's order.

    Attributes:
        order: Of it and of those that are multiplied with the same input.
        count: How many weights that are.
        start: The first row of this one.
    """

    order: Int8Order | Int4Order
    count: int
    start: int


class QuantizedWeight(nn.Module):
    """The numbers of a weight (O, I), as in `QuantizedTensor`."""

    packed: _Packed | None = None
    """The weight in the order of a kernel, from the first product on that is computed with it."""
    is_table = False
    """Whether rows are looked up, too; otherwise `values` go once `packed` is there."""

    def __init__(self, tensor: QuantizedTensor, dtype: torch.dtype):
        super().__init__()
        self.width, self.dtype = tensor.width, dtype
        zeros = None if tensor.zeros is None else torch.from_numpy(tensor.zeros)
        self.values: Tensor | None
        self.register_buffer("values", torch.from_numpy(tensor.values))
        self.scales: Tensor
        self.register_buffer("scales", torch.from_numpy(tensor.scales))
        self.zeros: Tensor | None
        self.register_buffer("zeros", zeros)

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Rows of the weight, in float32.

        Args:
            rows: Which, by their numbers (any,) or as a slice.
        """
        values, scales = self._values(), self.scales
        if isinstance(rows, Tensor):
            values, scales = values.index_select(0, rows), scales.index_select(0, rows)
        else:
            values, scales = values[rows], scales[rows]
        if self.zeros is None:
            return values * scales[..., None]
        steps = torch.stack((values & 15, values >> 4), -1).view(*scales.shape, GROUP).char()
        steps -= self.zeros[rows][..., None].char()
        return (steps * scales[..., None]).flatten(-2)[..., : self.width]

    def numbers(self) -> QuantizedTensor:
        """The numbers themselves, on the host."""
        zeros = None if self.zeros is None else self.zeros.cpu().numpy()
        values, scales = self._values().cpu().numpy(), self.scales.cpu().numpy()
        return QuantizedTensor.of(values, scales, zeros, self.width)

    def blocks(self) -> Iterator[Tensor]:
        """The weight in float32, some rows at a time."""
        size = _PART if self.scales.device == _CPU else _LARGE_PART
        step = max(1, size // max(1, self.width))
        for start in range(0, len(self.scales), step):
            yield self.dequantize(slice(start, start + step))

    def _values(self) -> Tensor:
        values, packed = self.values, self.packed  # another thread may be packing
        if values is not None:
            return values
        assert packed is not None
        return packed.order.values(packed.start, packed.start + len(self.scales))

    def __getstate__(self) -> dict[str, Any]:
        """The state that is copied and pickled: the plain numbers."""
        state = {name: value for name, value in self.__dict__.items() if name != "packed"}
        return _private.replace_buffer(state, "values", self._values())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.values, self.packed = self._values(), None
        scales = self.scales
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        super()._apply(fn, recurse)
        self.scales = scales.to(self._values().device)  # float32, whatever the model computes in
        return self


class QuantizedLinear(nn.Module):
    """`input @ weight.T + bias`."""

    is_unsigned = False
    """Whether no input is ever negative."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None):
        """Takes the weight over.

        Args:
            weight: Its numbers.
            bias: (O,), or None.
        """
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        """Computes the product."""
        if self.has_kernel(input):
            return self.make_linear()(input)
        dtype = product_dtype(input.dtype) if input.device == _CPU else input.dtype
        wide = input.to(dtype)
        parts = [F.linear(wide, block.to(dtype)).to(input.dtype) for block in self.weight.blocks()]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias

    def has_kernel(self, input: Tensor) -> bool:
        """Whether the product with an input is computed by a kernel for such weights."""
        is_here = input.device == self.weight.scales.device == _CPU
        if not (is_here and input.ndim > 1 and is_eager(input)):
            return False
        if self.weight.zeros is None:
            return _private.has_int8_linear()
        return _private.has_int4_linear() and block_rows() is not None

    def make_linear(self) -> Callable[[Tensor], Tensor]:
        """A function that computes what `forward` does from now on; see `linear.make_linear`."""
        return _make_linear([self]) if self.has_kernel(_ROW) else self.forward


def fused_linear(layers: Sequence[nn.Module], input: Tensor) -> list[Tensor]:
    """The results of linear layers with one input; one product, if all are plain and have one."""
    if all(
        isinstance(layer, QuantizedLinear)
        and layer.has_kernel(input)
        and not has_custom_call(layer)
        for layer in layers
    ):
        return make_fused_linear(layers)(input)
    return [apply_linear(layer, input) for layer in layers]


def bind(layer: Any) -> Callable[[Tensor], Tensor]:
    """A function that computes a linear layer, quantised or not; see `linear.make_linear`."""
    return layer.make_linear() if isinstance(layer, QuantizedLinear) else make_linear(layer)


def make_fused_linear(layers: Sequence[Any]) -> Callable[[Tensor], list[Tensor]]:
    """A function that computes linear layers with one input; see `linear.make_linear`."""
    if not all(isinstance(layer, QuantizedLinear) and layer.has_kernel(_ROW) for layer in layers):
        each = [bind(layer) for layer in layers]
        return lambda input: [linear(input) for linear in each]
    multiply, sizes = _make_linear(layers), [len(layer.weight.scales) for layer in layers]
    return lambda input: list(multiply(input).split(sizes, -1))


def _make_linear(layers: Sequence[QuantizedLinear]) -> Callable[[Tensor], Tensor]:
    """A function that computes layers with one input, one behind the other, by a kernel."""
    order = _pack([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers if layer.bias is not None]
    bias = torch.cat(biases).float() if biases else None
    if isinstance(order, Int8Order):
        return order.make_linear(bias, layers[0].is_unsigned)
    return order.make_linear(bias, layers[0].weight.width)


def _pack(weights: Sequence[QuantizedWeight]) -> Int8Order | Int4Order:
    """Weights with one input in a kernel's order, which takes the place of their `values`."""
    counts = [len(weight.scales) for weight in weights]
    starts = [sum(counts[:i]) for i in range(len(counts))]
    now = [weight.packed for weight in weights]
    first = now[0]
    if first is not None and all(
        packed is not None
        and packed.order is first.order
        and (packed.count, packed.start) == (len(weights), start)
        for packed, start in zip(now, starts, strict=True)
    ):
        return first.order
    values = torch.cat([weight._values() for weight in weights])
    scales = torch.cat([weight.scales for weight in weights])
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    order = Int4Order(values, scales, torch.cat(zeros)) if zeros else Int8Order(values, scales)
    for weight, start in zip(weights, starts, strict=True):
        weight.packed = _Packed(order, len(weights), start)
        if not weight.is_table:
            weight.values = None
    return order


class QuantizedEmbedding(nn.Module):
    """A table of rows."""

    is_quantized = True
    """The mark that `opt_core.quantization.is_quantized` looks for."""

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.weight = weight
        weight.is_table = True

    def forward(self, rows: Tensor) -> Tensor:
        """Looks rows up."""
        found = self.weight.dequantize(rows.flatten()).view(*rows.shape, -1)
        return found.to(self.weight.dtype)


def set_quantized(
    model: "OPTPreTrainedModel",
    spec: ParamSpec,
    tensor: QuantizedTensor,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Puts a quantised weight in the place of a float one.

    Args:
        model: The model.
        spec: The parameter it is.
        tensor: Its numbers.
        dtype: Type the model computes in.
        device: Where to put it.
    """
    parent, name = TORCH.parent(model, spec)
    weight = QuantizedWeight(tensor, dtype).to(device).eval()
    if spec.kind == "embedding":
        new = QuantizedEmbedding(weight)
    else:
        new = QuantizedLinear(weight, getattr(parent, name).bias)
        new.is_unsigned = name == "fc2" and model.config.activation_function == "relu"
    setattr(parent, name, new.eval())


def get_quantized(model: "OPTPreTrainedModel", spec: ParamSpec) -> QuantizedWeight | None:
    """The numbers of a parameter; None if it is kept in floating point."""
    if not spec.name.endswith(".weight") or not is_quantized(model):
        return None
    parent, name = TORCH.parent(model, spec)
    weight = getattr(getattr(parent, name), "weight", None)
    return weight if isinstance(weight, QuantizedWeight) else None
