"""Products with 4-bit weights on the CPU, at the rate at which memory is read.

PyTorch's kernel for them reads the packed weight once for a few rows and widens it in registers. It
is made for bfloat16 (float32 rows take it 25 times as long), so rows, results and the grid of each
group are rounded to that; a weight is `(q - 8) * scale + shift` there, with the shift
`(8 - zero) * scale` where the exact one is `(q - zero) * scale`. For many rows an ordinary product
is faster: parts of the weight are widened, exactly, while they fit the processor's caches.
"""

from collections.abc import Callable, Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.quantization import GROUP
from opt_torch import _private
from opt_torch.linear import product_dtype

FEW_ROWS = 64
"""Rows up to which the kernel is faster than widening the weight."""

_PART = 1 << 19  # weights that are widened at once
_MIDDLE = 8  # the kernel's zero point


class Int4Order:
    """Weights of one width in the kernel's order: for a block of outputs one input after the other.

    Attributes:
        packed: uint8 (blocks, I, block / 2): outputs j and j + block / 2 in a byte, the first in
            the low bits. The inputs are filled up to whole groups, the outputs to whole blocks.
        grids: bfloat16 (groups, O', 2), the kernel's scales and shifts.
    """

    def __init__(self, values: Tensor, scales: Tensor, zeros: Tensor):
        """Packs the numbers of a `QuantizedTensor`: values (O, I / 2), the rest (O, groups)."""
        block = block_rows()
        assert block is not None
        self.rows = len(values)
        free = -self.rows % block
        if free:
            values, scales, zeros = (
                torch.cat((numbers, numbers.new_zeros(free, numbers.shape[1])))
                for numbers in (values, scales, zeros)
            )
        step = max(1, _PART // (2 * values.shape[1]) // block) * block
        self.packed = torch.cat([pack(part, block) for part in values.split(step)])
        self.scales, self.zeros = scales, zeros
        narrow = scales.bfloat16()
        shifts = ((_MIDDLE - zeros.float()) * narrow.float()).bfloat16()
        self.grids = torch.stack((narrow.T, shifts.T), -1).contiguous()

    def values(self, start: int, stop: int) -> Tensor:
        """The numbers of some outputs as they were given, uint8 (stop - start, I / 2)."""
        block = 2 * self.packed.shape[-1]
        first = start // block
        return unpack(self.packed[first : -(-stop // block)])[start - first * block :][
            : stop - start
        ]

    def make_linear(self, bias: Tensor | None, width: int) -> Callable[[Tensor], Tensor]:
        """A function that multiplies rows (..., width) with the weights.

        Args:
            bias: float32 (O,), or None.
            width: Inputs there are, before they were filled up.
        """
        call, grids, rows = _private.overload(_private.int4_linear), self.grids, self.rows
        # As the kernel wants its shape; the bytes are the same.
        order = self.packed.view(grids.shape[1], -1)
        free, free_rows = 2 * order.shape[1] - width, len(order) - rows

        def multiply(input: Tensor) -> Tensor:
            flat = input.reshape(-1, width)
            if free:
                flat = F.pad(flat, (0, free))
            if len(flat) <= FEW_ROWS:
                out = call(flat.bfloat16(), order, GROUP, grids)
            else:
                wide = flat.to(product_dtype(flat.dtype))
                out = torch.cat([wide @ part.to(wide.dtype) for part in self._parts()], -1)
            if free_rows:
                out = out[:, :rows]
            out = out.to(input.dtype) if bias is None else (out + bias).to(input.dtype)
            return out.view(*input.shape[:-1], rows)

        return multiply

    def _parts(self) -> Iterator[Tensor]:
        """The weight in float32, some outputs (I, columns) at a time."""
        blocks, width, half = self.packed.shape
        step = max(1, _PART // (2 * half * width))
        for start in range(0, blocks, step):
            packed = self.packed[start : start + step]
            steps = torch.empty(width, len(packed), 2, half)
            steps[:, :, 0] = (packed & 15).transpose(0, 1)
            steps[:, :, 1] = (packed >> 4).transpose(0, 1)
            outputs = slice(start * 2 * half, (start + len(packed)) * 2 * half)
            grouped = steps.view(-1, GROUP, len(packed) * 2 * half)
            grouped -= self.zeros[outputs].T[:, None]
            grouped *= self.scales[outputs].T[:, None]
            yield grouped.view(width, -1)


def pack(values: Tensor, block: int) -> Tensor:
    """Two inputs a byte (O, I / 2) as two outputs a byte (O / block, I, block / 2)."""
    outputs = values.view(-1, 2, block // 2, values.shape[1])
    first, second = outputs[:, 0], outputs[:, 1]
    even = (first & 15) | (second << 4)
    odd = (first >> 4) | (second & 240)
    return torch.stack((even, odd), -1).flatten(-2).transpose(1, 2).contiguous()


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    steps = torch.cat((packed & 15, packed >> 4), -1).transpose(1, 2)
    return (steps[..., ::2] | steps[..., 1::2] << 4).flatten(0, 1)


@cache
def block_rows() -> int | None:
    """Outputs that the kernel's order keeps together; None if that is not an order known here.

    It hangs on the processor, so PyTorch's own packing is asked.
    """
    steps = torch.arange(128 * GROUP, dtype=torch.int32).view(128, GROUP) * 7 // 3 % 16
    expected = _private.int4_pack(steps, 1).flatten()
    values = (steps[:, ::2] | steps[:, 1::2] << 4).to(torch.uint8)
    return next((n for n in (32, 64) if torch.equal(pack(values, n).flatten(), expected)), None)
