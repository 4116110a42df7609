"""Products with 8-bit weights on the CPU, in integers: FBGEMM's, faster than float32.

The input is quantised too, each row by itself, to 7 bits: processors without instructions for such
products add pairs of them up in 16 bits, which 8 bits would overflow. Every sum is exact, so a
row's result depends on nothing but the row, and layers with one input can share one product.
"""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from opt_torch import _private

_SIGNED = 1 / 63, 64
"""Step of an input within -1..1, and the number that stands for 0 in 0..127."""
_UNSIGNED = 1 / 127, 0
"""The same for 0..1."""
_SMALLEST = torch.finfo(torch.float32).tiny


class Int8Order:
    """Weights of one width in FBGEMM's order."""

    def __init__(self, values: Tensor, scales: Tensor):
        """Packs the numbers of a `QuantizedTensor`: values (O, I) and scales (O,)."""
        zeros, engine = torch.zeros(len(values), dtype=torch.int64), torch.backends.quantized.engine
        torch.backends.quantized.engine = "fbgemm"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # to be replaced
                numbers = _private.quantize_per_channel(values, scales, zeros, 0)
                self.packed = _private.int8_prepack(numbers, None)
        finally:
            torch.backends.quantized.engine = engine

    def values(self, start: int, stop: int) -> Tensor:
        """The numbers of some outputs as they were given, int8 (stop - start, I)."""
        unpacked: Tensor = _private.int8_unpack(self.packed)[0].int_repr()
        return unpacked[start:stop].clone()

    def make_linear(self, bias: Tensor | None, is_unsigned: bool) -> Callable[[Tensor], Tensor]:
        """A function that multiplies rows (..., I) with the weights.

        Args:
            bias: float32 (O,), or None.
            is_unsigned: Whether no input is ever negative.
        """
        call, order = _private.overload(_private.int8_linear), self.packed
        step, zero = _UNSIGNED if is_unsigned else _SIGNED

        def multiply(input: Tensor) -> Tensor:
            rows, size = _scaled(input)
            out: Tensor = call(rows, step, zero, order)
            out = out.mul_(size) if bias is None else torch.addcmul(bias, out, size)
            return out.to(input.dtype)

        return multiply


def _scaled(input: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest absolute values, so that one step serves them all; and these.

    Both are float32.
    """
    wide = input if input.dtype == torch.float32 else input.float()
    size = wide.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST)
    return wide / size, size
