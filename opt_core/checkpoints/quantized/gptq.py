"""GPTQ's files, as AutoGPTQ and GPTQModel write them.

A layer (O, I) is `qweight` int32 (I * bits / 32, O), packed along the inputs; `qzeros` int32
(G, O * bits / 32), packed along the outputs; `scales` (G, O); and, since act-order is known,
`g_idx` (I,), the group of each input. The first version of the format stores zero points less one;
what is stored for zero is then all ones.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from opt_core.checkpoints.quantized.bits import WORD, unpack_bits, words_for
from opt_core.checkpoints.quantized.settings import GPTQ
from opt_core.checkpoints.quantized.tensor import (
    Grid,
    GridTensor,
    Parts,
    check_groups,
    group_of_inputs,
    read_scales,
)
from opt_core.checkpoints.tensors import LazyTensor

LEAVES = ("qweight", "qzeros", "scales", "g_idx")
"""Last names of a layer's tensors, the one that every layer has first."""


@dataclass(frozen=True, eq=False)
class GPTQTensor(GridTensor):
    """A weight in GPTQ's layout.

    Attributes:
        settings: Those of the checkpoint.
        order: The tensor of each input's group, or None.
    """

    settings: GPTQ
    order: LazyTensor | None

    def grid(self, start: int, stop: int) -> Grid:
        """Some rows."""
        bits, (outputs, width) = self.settings.bits, self.shape
        weights, zeros, scales = self.parts[:3]
        steps = unpack_bits(weights.read()[:, start:stop], bits, width).T
        points = unpack_bits(zeros.read().T, bits, outputs)[start:stop]
        if not self.settings.is_v2:
            points = (points + np.uint8(1)) & np.uint8((1 << bits) - 1)
        groups = group_of_inputs(width, self.settings.group_size, scales.shape[0], self.order)
        return Grid(steps, points, read_scales(scales)[:, start:stop].T, groups)


def open_layer(parts: Parts, settings: Any) -> GPTQTensor:
    """The weight that a layer's tensors stand for.

    Raises:
        CheckpointError: They do not fit one another, or the settings.
    """
    weights = parts.take("qweight", (np.int32,), (None, None))
    words, outputs = weights.shape
    if words * WORD % settings.bits or words_for(words * WORD // settings.bits, settings.bits) != (
        words
    ):
        expected = f"a multiple of {settings.bits} words for {settings.bits}-bit numbers"
        raise parts.wrong(weights, expected, str(list(weights.shape)))
    width = words * WORD // settings.bits
    scales = parts.take_floats("scales", (None, outputs))
    check_groups(parts, scales, 0, width, settings.group_size)
    packed = words_for(outputs, settings.bits)
    zeros = parts.take("qzeros", (np.int32,), (scales.shape[0], packed))
    order = None
    if "g_idx" in parts.tensors:
        order = parts.take("g_idx", (np.int32, np.int64), (width,))
    shape, found = (outputs, width), (weights, zeros, scales)
    if order is not None:
        found = (*found, order)
    name = f"{parts.name}.weight"
    return GPTQTensor(name, shape, f"int{settings.bits}", found, settings, order)
