"""Our quantised weights in GPTQ's layout (`gptq`), for programs that read no other.

Zero points are stored as they are, which is the second version of the format: in the first, one of
0 has no place of its own, and programs that add 1 to whole words spoil the number beside it.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.quantized.bits import WORD, pack_bits, words_for
from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec
from opt_core.quantization import GROUP, QuantizedTensor, unpack

BITS = (3, 4, 8)
"""Bits of a number that are written."""
_MIDDLE = 128  # what stands for 0 in 8 bits
_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)


def gptq_layer(
    spec: ParamSpec, bits: int, fetch: Callable[[ParamSpec], QuantizedTensor]
) -> list[PendingTensor]:
    """The tensors of a layer's weight.

    Args:
        spec: The weight (O, I).
        bits: 3 or 4 of an "int4" weight, whose numbers fit; 8 of an "int8" one.
        fetch: Gives its numbers; called for each of the tensors.

    Raises:
        ConfigError: Rows or columns do not fill whole words.
    """
    (outputs, width), layer = spec.shape, spec.name.removesuffix(".weight")
    if width * bits % WORD or outputs * bits % WORD:
        raise ConfigError(
            f"{spec.name}: GPTQ's words of {WORD} bits hold whole rows and columns only, received "
            f"{list(spec.shape)} of {bits} bits; write to safetensors (compressed-tensors)"
        )
    size = width if bits == 8 else GROUP
    groups = -(-width // size)
    order = (np.arange(width) // size).astype(np.int32)

    def pending(
        leaf: str,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        make: Callable[[QuantizedTensor], NDArray[Any]],
    ) -> PendingTensor:
        return PendingTensor(f"{layer}.{leaf}", shape, dtype, lambda: make(fetch(spec)))

    def scales(numbers: QuantizedTensor) -> NDArray[Any]:
        return np.ascontiguousarray(numbers.scales.reshape(outputs, groups).T)

    return [
        PendingTensor(f"{layer}.g_idx", (width,), _INT32, lambda: order),
        pending(
            *("qweight", (words_for(width, bits), outputs), _INT32),
            lambda numbers: pack_bits(_steps(numbers).T, bits),
        ),
        pending(
            *("qzeros", (groups, words_for(outputs, bits)), _INT32),
            lambda numbers: np.ascontiguousarray(pack_bits(_zeros(numbers), bits).T),
        ),
        pending("scales", (groups, outputs), _FLOAT32, scales),
    ]


def gptq_config(bits: int) -> dict[str, Any]:
    """The `quantization_config` of a model of such layers."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if bits == 8 else GROUP,
        "desc_act": False,
        "sym": bits == 8,
        "lm_head": False,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
    }


def _steps(numbers: QuantizedTensor) -> NDArray[np.uint8]:
    """Numbers (O, I) from 0 on."""
    if numbers.zeros is None:
        return (numbers.values.astype(np.int16) + _MIDDLE).astype(np.uint8)
    return unpack(numbers.values)[:, : numbers.width]


def _zeros(numbers: QuantizedTensor) -> NDArray[np.uint8]:
    """Zero points (O, G)."""
    if numbers.zeros is None:
        return np.full((len(numbers.values), 1), _MIDDLE, np.uint8)
    return numbers.zeros
