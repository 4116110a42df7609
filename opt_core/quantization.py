"""Quantised weights: which tensors, in which numbers, and what those numbers stand for.

Both schemes round to the nearest point of an even grid, the baseline called RTN in the GPTQ paper
(Frantar et al. 2022, arXiv 2210.17323):

- "int8" is symmetric, one scale per output channel (a row of a linear weight, a token of the
  embedding): `scale = max |w| / 127`, `q = round(w / scale)` in -127..127.
- "int4" is asymmetric, as in the paper, on the min-max grid of each group of 64 inputs of a
  channel; the grid holds zero: `scale = (max - min) / 15`, `zero = round(-min / scale)`,
  `q = round(w / scale) + zero` in 0..15.

Ties go to the even integer. A weight is `(q - zero) * scale`, one rounding in float32, so that
every backend computes the same bits. Everything here is float32, whatever type the file has.

The linear weights and the token embedding (a tied language-model head is the same tensor) are
quantised; positions, norms, biases and the small heads of classification and question answering
stay as they are. "int4" is for the layers' weights, where GPTQ puts it; the embedding, the
projections around the layers and an untied head are "int8" then.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import CheckpointError, ConfigError
from opt_core.params import ParamSpec

SCHEMES = ("int8", "int4")
"""Schemes that `from_pretrained(quantize=...)` takes besides None."""

GROUP = 64
"""Inputs that share a scale and a zero point in "int4"."""

_SMALLEST = np.finfo(np.float32).tiny  # below it, frameworks differ: some flush to zero
_BLOCK = 1 << 22  # weights at a time, so that temporaries stay small


@dataclass(frozen=True)
class QuantizedTensor:
    """The numbers of one weight (O, I).

    Attributes:
        scheme: "int8" or "int4".
        values: int8 (O, I); or uint8 (O, groups * 32), two inputs a byte, the earlier one in the
            low bits, the last of the groups filled up with its zero point.
        scales: float32 (O,), or (O, groups).
        zeros: uint8 (O, groups); None for "int8", whose zero point is 0.
        width: Inputs there are.
    """

    scheme: str
    values: NDArray[Any]
    scales: NDArray[np.float32]
    zeros: NDArray[np.uint8] | None
    width: int

    @classmethod
    def empty(cls, shape: tuple[int, ...], scheme: str) -> "QuantizedTensor":
        """The numbers of a weight of this shape, allocated and still to be filled in."""
        rows, width = shape
        groups = -(-width // GROUP)
        if scheme == "int8":
            values: NDArray[Any] = np.empty((rows, width), np.int8)
            return cls(scheme, values, np.empty(rows, np.float32), None, width)
        values = np.empty((rows, groups * GROUP // 2), np.uint8)
        scales, zeros = np.empty((rows, groups), np.float32), np.empty((rows, groups), np.uint8)
        return cls(scheme, values, scales, zeros, width)

    @classmethod
    def of(
        cls,
        values: NDArray[Any],
        scales: NDArray[np.float32],
        zeros: NDArray[np.uint8] | None,
        width: int,
    ) -> "QuantizedTensor":
        """These numbers, in the scheme that they are of: only "int4" has zero points."""
        return cls("int8" if zeros is None else "int4", values, scales, zeros, width)

    def rounded(self, steps: NDArray[Any]) -> "QuantizedTensor":
        """Other numbers on the same grids.

        Args:
            steps: Whole numbers (O, I), in the scheme's range.
        """
        if self.zeros is None:
            return replace(self, values=steps.astype(np.int8))
        return replace(self, values=pack(steps.astype(np.uint8), self.zeros))

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers."""
        zeros = 0 if self.zeros is None else self.zeros.nbytes
        return self.values.nbytes + self.scales.nbytes + zeros

    def dequantize(self) -> NDArray[np.float32]:
        """The weight they stand for, float32 (O, I)."""
        if self.zeros is None:
            return self.values * self.scales[:, None]
        steps = unpack(self.values).reshape(*self.scales.shape, GROUP).astype(np.int8)
        steps -= self.zeros[..., None].astype(np.int8)
        return (steps * self.scales[..., None]).reshape(len(steps), -1)[:, : self.width]


def check_scheme(quantize: Any) -> None:
    """Refuses what is neither None nor one of `SCHEMES`.

    Raises:
        ConfigError: It is something else.
    """
    if quantize is not None and quantize not in SCHEMES:
        expected = ", ".join(f'"{scheme}"' for scheme in SCHEMES)
        raise ConfigError(f"quantize: expected {expected} or None, received {quantize!r}")


def scheme_of(spec: ParamSpec, quantize: str | None) -> str | None:
    """How a parameter is kept in a model loaded with `quantize`; None: in floating point."""
    is_weight = spec.kind == "linear" and len(spec.shape) == 2 and "labels" not in spec.axes
    if quantize is None or not (is_weight or spec.axes == ("vocab", "embed")):
        return None
    return quantize if ".layers." in spec.name else "int8"


def is_quantized(model: Any) -> bool:
    """Whether a model was loaded with `quantize`: its layers say so."""
    return getattr(model.get_decoder().embed_tokens, "is_quantized", False)


def check_not_quantized(model: Any, action: str) -> None:
    """Refuses what quantised weights cannot do.

    Args:
        model: A model of any backend.
        action: What it is asked to do, for the message.

    Raises:
        ConfigError: The model is quantised.
    """
    if is_quantized(model):
        raise ConfigError(
            f"{action}: a model with quantised weights can only be run; load it without quantize"
        )


def quantize_array(name: str, array: NDArray[Any], scheme: str) -> QuantizedTensor:
    """Quantises one weight.

    Args:
        name: Its name, for messages.
        array: (O, I) in any floating-point type; it may be a view of a file.
        scheme: "int8" or "int4".

    Raises:
        CheckpointError: It has values that are not finite, or beyond float32.
    """
    rows, width = array.shape
    made = QuantizedTensor.empty((rows, width), scheme)
    step = max(1, _BLOCK // max(1, width))
    for i in range(0, rows, step):
        part = slice(i, i + step)
        with np.errstate(over="ignore", invalid="ignore"):
            block = array[part].astype(np.float32)
        if not np.isfinite(block).all():
            raise CheckpointError(f"{name}: values that are not finite cannot be quantised")
        if made.zeros is None:
            made.values[part], made.scales[part] = _int8(block)
        else:
            groups = made.scales.shape[1]
            made.values[part], made.scales[part], made.zeros[part] = _int4(block, groups)
    return made


def unpack(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Two numbers of four bits for each byte, the one in the low bits first."""
    pairs: NDArray[np.uint8] = np.stack((packed & 15, packed >> 4), -1).astype(np.uint8)
    return pairs.reshape(*packed.shape[:-1], -1)


def pack(steps: NDArray[np.uint8], zeros: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Numbers of four bits (O, I), two a byte; what is free of the last group is its zero point."""
    free = zeros.shape[1] * GROUP - steps.shape[1]
    steps = np.concatenate((steps, np.repeat(zeros[:, -1:], free, 1)), 1)
    packed: NDArray[np.uint8] = (steps[:, ::2] | steps[:, 1::2] << 4).astype(np.uint8, copy=False)
    return packed


def _int8(block: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    scales = np.maximum(np.abs(block).max(1, initial=0) / np.float32(127), _SMALLEST)
    # A scale that had to be raised, or was rounded down, may lead one step beyond.
    steps = np.clip(np.rint(block / scales[:, None]), -127, 127)
    return steps.astype(np.int8), scales


def _int4(
    block: NDArray[np.float32], groups: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    free = groups * GROUP - block.shape[1]
    grouped = np.pad(block, ((0, 0), (0, free))).reshape(len(block), groups, GROUP)
    low, high = grouped.min(-1, initial=0), grouped.max(-1, initial=0)
    # Halves first: the difference of two large numbers must not overflow.
    scales = np.maximum((high / 2 - low / 2) / np.float32(7.5), _SMALLEST)
    zeros = np.clip(np.rint(-low / scales), 0, 15)
    steps = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, 15)
    steps = steps.astype(np.uint8).reshape(len(block), -1)
    return steps[:, ::2] | steps[:, 1::2] << 4, scales, zeros.astype(np.uint8)
