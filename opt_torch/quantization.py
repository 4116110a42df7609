"""Quantised weights: the layers that hold them, and the products they take part in.

A layer keeps the numbers of `opt_core.quantization` and computes with the weight they stand for,
a block of it at a time: no whole weight is ever there in floating point. That saves memory, not
time. Such a model can only be run: it has no parameters to train and none to save.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_core.dialects import TORCH
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec
from opt_core.quantization import GROUP, QuantizedTensor

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel

_BLOCK = 1 << 22  # weights at a time: 16 MiB as float32


class QuantizedWeight(nn.Module):
    """The numbers of a weight [out, in], as in `QuantizedTensor`."""

    def __init__(self, tensor: QuantizedTensor, dtype: torch.dtype):
        super().__init__()
        self.width, self.dtype = tensor.width, dtype
        zeros = None if tensor.zeros is None else torch.from_numpy(tensor.zeros)
        self.values: Tensor
        self.register_buffer("values", torch.from_numpy(tensor.values))
        self.scales: Tensor
        self.register_buffer("scales", torch.from_numpy(tensor.scales))
        self.zeros: Tensor | None
        self.register_buffer("zeros", zeros)

    def dequantize(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """Rows of the weight, in float32.

        Args:
            rows: Which, by their numbers (of any shape) or as a slice.
        """
        values, scales = self.values[rows], self.scales[rows]
        if self.zeros is None:
            return values * scales[..., None]
        steps = torch.stack((values & 15, values >> 4), -1).view(*scales.shape, GROUP).char()
        steps -= self.zeros[rows][..., None].char()
        return (steps * scales[..., None]).flatten(-2)[..., : self.width]

    def blocks(self) -> Iterator[Tensor]:
        """The weight in float32, some rows at a time."""
        step = max(1, _BLOCK // max(1, self.width))
        for start in range(0, len(self.scales), step):
            yield self.dequantize(slice(start, start + step))

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        scales = self.scales
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scales.device)).dtype
        super()._apply(fn, recurse)
        self.scales = scales.to(self.values.device)  # float32, whatever the model computes in
        return self


class QuantizedLinear(nn.Module):
    """`input @ weight.T + bias`."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None):
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, input: Tensor) -> Tensor:
        """Computes the product."""
        parts = [F.linear(input, block.to(input.dtype)) for block in self.weight.blocks()]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias


class QuantizedEmbedding(nn.Module):
    """A table of rows."""

    def __init__(self, weight: QuantizedWeight):
        super().__init__()
        self.weight = weight

    def forward(self, rows: Tensor) -> Tensor:
        """Looks rows up."""
        return self.weight.dequantize(rows).to(self.weight.dtype)


def place(
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
    parent, name = _locate(model, spec)
    weight = QuantizedWeight(tensor, dtype).to(device).eval()
    if spec.kind == "embedding":
        new = QuantizedEmbedding(weight)
    else:
        new = QuantizedLinear(weight, getattr(parent, name).bias)
    setattr(parent, name, new.eval())


def find(model: "OPTPreTrainedModel", spec: ParamSpec) -> QuantizedWeight | None:
    """The numbers of a parameter; None if it is kept in floating point."""
    if not spec.name.endswith(".weight") or not is_quantized(model):
        return None
    parent, name = _locate(model, spec)
    weight = getattr(getattr(parent, name), "weight", None)
    return weight if isinstance(weight, QuantizedWeight) else None


def is_quantized(model: "OPTPreTrainedModel") -> bool:
    """Whether a model was loaded with `quantize`."""
    return isinstance(model.get_decoder().embed_tokens, QuantizedEmbedding)


def refuse(model: "OPTPreTrainedModel", action: str) -> None:
    """Refuses what quantised weights cannot do.

    Raises:
        ConfigError: The model is quantised.
    """
    if is_quantized(model):
        raise ConfigError(
            f"{action}: a model with quantised weights can only be run; load it without quantize"
        )


def _locate(model: "OPTPreTrainedModel", spec: ParamSpec) -> tuple[nn.Module, str]:
    """The layer that owns a parameter: where it hangs, and its name there."""
    *outer, name, _ = TORCH.path(spec)
    return model.get_submodule(".".join(outer[1:] if model.head == "none" else outer)), name
