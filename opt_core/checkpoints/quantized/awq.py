"""AWQ's files, as AutoAWQ writes them for its "gemm" kernels.

A layer (O, I) is `qweight` int32 (I, O / 8) and `qzeros` int32 (G, O / 8), both packed along the
outputs, and `scales` (G, O). The eight numbers of a word are those of eight outputs, but in another
order: those of even number first.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.quantized.bits import unpack_bits
from opt_core.checkpoints.quantized.tensor import (
    Grid,
    GridTensor,
    Parts,
    check_groups,
    group_of_inputs,
    read_scales,
)

LEAVES = ("qweight", "qzeros", "scales")
"""Last names of a layer's tensors, the one that every layer has first."""

_BITS = 4
_IN_WORD = 8
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word the numbers of eight outputs are."""


class AWQTensor(GridTensor):
    """A weight in AWQ's layout."""

    def grid(self, start: int, stop: int) -> Grid:
        """Some rows."""
        weights, zeros, scales = self.parts
        first, last = start // _IN_WORD, -(-stop // _IN_WORD)
        inside = slice(start - first * _IN_WORD, stop - first * _IN_WORD)
        steps, points = (_unpack(part.read()[:, first:last])[inside] for part in (weights, zeros))
        size = -(-self.shape[1] // scales.shape[0])
        groups = group_of_inputs(self.shape[1], size, scales.shape[0], None)
        return Grid(steps, points, read_scales(scales)[:, start:stop].T, groups)


def _unpack(words: NDArray[Any]) -> NDArray[np.uint8]:
    """The numbers of all outputs (O, N) of words (N, O / 8)."""
    outputs = words.shape[1] * _IN_WORD
    in_words = unpack_bits(words.T, _BITS, outputs).reshape(-1, _IN_WORD, len(words))
    return in_words[:, _PLACES].reshape(outputs, -1)


def open_layer(parts: Parts, settings: Any) -> AWQTensor:
    """The weight that a layer's tensors stand for.

    Raises:
        CheckpointError: They do not fit one another, or the settings.
    """
    weights = parts.take("qweight", (np.int32,), (None, None))
    width, words = weights.shape
    scales = parts.take_floats("scales", (None, words * _IN_WORD))
    check_groups(parts, scales, 0, width, settings.group_size)
    zeros = parts.take("qzeros", (np.int32,), (scales.shape[0], words))
    shape = (words * _IN_WORD, width)
    return AWQTensor(f"{parts.name}.weight", shape, "int4", (weights, zeros, scales))
