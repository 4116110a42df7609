"""Products with 8-bit weights on the CPU, in integers: FBGEMM's, faster than float32.

The input is quantised too, each row by itself: to 8 bits where the processor adds products up in 32
bits (VNNI, AMX), else to 7, as pairs of them are added up in 16 there, which 8 bits would overflow.
Every sum is exact, so a row's result depends on nothing but the row, and layers with one input can
share one product.
"""

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from opt_torch import _private

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
        step, zero = _grid(input_bits(), is_unsigned)

        def multiply(input: Tensor) -> Tensor:
            rows, size = _scaled(input)
            out: Tensor = call(rows, step, zero, order)
            # In place: new memory for the logits of a prompt costs a fifth of the product.
            out = out.mul_(size) if bias is None else torch.addcmul(bias, out, size, out=out)
            return out.to(input.dtype)

        return multiply


@cache
def input_bits() -> int:
    """Bits of an input that no sum of this processor's overflows, 7 or 8: the largest is tried."""
    width = 64
    weights = Int8Order(torch.full((32, width), 127, dtype=torch.int8), torch.ones(32))
    step, zero = _grid(8, is_unsigned=True)
    sums = _private.int8_linear(torch.ones(2, width), step, zero, weights.packed)
    return 8 if torch.allclose(sums, torch.full_like(sums, 127 * width)) else 7


def _grid(bits: int, is_unsigned: bool) -> tuple[float, int]:
    """The step of inputs within -1..1 (0..1 unsigned), and the number that stands for 0."""
    largest = 2**bits - 1
    return (1 / largest, 0) if is_unsigned else (2 / (largest - 1), (largest + 1) // 2)


def _scaled(input: Tensor) -> tuple[Tensor, Tensor]:
    """Rows divided by their largest absolute values, so that one step serves them all; and these.

    Both are float32.
    """
    wide = input if input.dtype == torch.float32 else input.float()
    size = wide.abs().amax(-1, keepdim=True).clamp_min_(_SMALLEST)
    return wide / size, size
