"""Our quantised weights as tensors of compressed-tensors, which vLLM and transformers read.

The layers' weights are "pack-quantized": "int4" in groups with zero points, "int8" as 8 bits with
one scale to a channel. Neither program keeps an embedding, or the projections around the layers, or
a head in 8 bits as we do: for them these are in floating point as everywhere, and our own numbers
are in a file beside, which no index names, as int8 and scales.

In GPTQ's layout (`gptq_writing`) the layers alone are quantised.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.quantized.bits import WORD, words_for
from opt_core.checkpoints.quantized.gptq_writing import gptq_config, gptq_layer
from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.checkpoints.tensors import cast_array
from opt_core.params import ParamSpec
from opt_core.quantization import GROUP, QuantizedTensor, scheme_of

Fetch = Callable[[ParamSpec], Any]

_BITS = {"int8": 8, "int4": 4}
_SIGN = np.uint8(128)
_FLOAT32, _INT64, _INT32 = np.dtype(np.float32), np.dtype(np.int64), np.dtype(np.int32)


class QuantizedFiles(NamedTuple):
    """The tensors of a quantised model.

    Attributes:
        main: Those that every program reads.
        side: Those of the file beside.
        config: The `quantization_config` of config.json.
    """

    main: list[PendingTensor]
    side: list[PendingTensor]
    config: dict[str, Any]


def quantized_files(
    specs: Sequence[ParamSpec],
    fetch: Fetch,
    scheme: str,
    dtype: np.dtype[Any],
    gptq_bits: int | None = None,
) -> QuantizedFiles:
    """The tensors that a quantised model is written as.

    Args:
        specs: Its parameters.
        fetch: Gives a parameter's values, or its `QuantizedTensor` where it has one; it may be
            called several times for one.
        scheme: "int8" or "int4".
        dtype: Type of what is stored in floating point.
        gptq_bits: Bits of a number in GPTQ's layout; None: as compressed-tensors has it.

    Raises:
        ConfigError: GPTQ's layout has no place for weights of these sizes.
    """
    main: list[PendingTensor] = []
    side: list[PendingTensor] = []
    last = _Last(fetch)
    for spec in specs:
        kept = written_scheme(spec, scheme, gptq_bits)
        if kept is not None and _is_packed(spec):
            is_gptq = gptq_bits is not None
            main += gptq_layer(spec, gptq_bits, last) if is_gptq else _packed(spec, kept, last)
            continue
        main.append(_plain(spec, last, dtype))
        if kept is not None:
            side += _beside(spec, last)
    config = _config(specs, scheme) if gptq_bits is None else gptq_config(gptq_bits)
    return QuantizedFiles(main, side, config)


def written_scheme(spec: ParamSpec, scheme: str, gptq_bits: int | None) -> str | None:
    """How a parameter is stored: `scheme_of` it; in GPTQ's layout, layers' weights alone."""
    return scheme_of(spec, scheme) if gptq_bits is None or _is_packed(spec) else None


def _is_packed(spec: ParamSpec) -> bool:
    return ".layers." in spec.name


class _Last:
    """The values fetched last: the tensors of one weight are written one after the other."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._spec: ParamSpec | None = None
        self._values: Any = None

    def __call__(self, spec: ParamSpec) -> Any:
        if spec != self._spec:
            self._spec = self._values = None  # or two would be held for a moment
            self._values = self._fetch(spec)
            self._spec = spec
        return self._values


def _plain(spec: ParamSpec, last: _Last, dtype: np.dtype[Any]) -> PendingTensor:
    def make() -> NDArray[Any]:
        values = last(spec)
        if isinstance(values, QuantizedTensor):
            values = values.dequantize()
        return cast_array(spec.name, np.asarray(values), dtype)

    return PendingTensor(spec.name, spec.shape, dtype, make)


def _packed(spec: ParamSpec, scheme: str, last: _Last) -> list[PendingTensor]:
    (outputs, width), bits, name = spec.shape, _BITS[scheme], spec.name
    groups = 1 if scheme == "int8" else -(-width // GROUP)

    def pending(
        leaf: str, shape: tuple[int, ...], dtype: np.dtype[Any], make: Callable[[Any], NDArray[Any]]
    ) -> PendingTensor:
        return PendingTensor(f"{name}_{leaf}", shape, dtype, lambda: make(last(spec)))

    words, rows = words_for(width, bits), words_for(outputs, bits)
    size = np.array(spec.shape, np.int64)
    tensors = [
        PendingTensor(f"{name}_shape", (2,), _INT64, lambda: size),
        pending("packed", (outputs, words), _INT32, pack_values),
        pending("scale", (outputs, groups), _FLOAT32, lambda n: n.scales.reshape(outputs, groups)),
    ]
    if scheme == "int4":
        zeros = pending("zero_point", (rows, groups), _INT32, lambda n: pack_zeros(n.zeros))
        tensors.append(zeros)
    return tensors


def _beside(spec: ParamSpec, last: _Last) -> list[PendingTensor]:
    shape = (spec.shape[0], 1)
    return [
        PendingTensor(
            f"{spec.name}_scale", shape, _FLOAT32, lambda: last(spec).scales.reshape(shape)
        ),
        PendingTensor(spec.name, spec.shape, np.dtype(np.int8), lambda: last(spec).values),
    ]


def pack_values(numbers: QuantizedTensor) -> NDArray[np.int32]:
    """A weight's numbers (O, I) in words, the earliest in the lowest bits, zeros behind the last.

    Four bits are in this order already; eight get half of their range added.
    """
    bits = _BITS[numbers.scheme]
    words = words_for(numbers.width, bits)
    if numbers.scheme == "int8":
        steps = numbers.values.view(np.uint8) ^ _SIGN
        steps = np.pad(steps, ((0, 0), (0, words * WORD // bits - numbers.width)))
        return steps.view(np.int32)
    packed = np.ascontiguousarray(numbers.values[:, : words * WORD // 8])
    if numbers.width % (WORD // bits):
        packed = packed.copy()
        packed[:, -(-numbers.width // 2) :] = 0
        if numbers.width % 2:
            packed[:, numbers.width // 2] &= 15
    return packed.view(np.int32)


def pack_zeros(zeros: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Zero points of four bits (O, G) in words along the outputs."""
    in_word = WORD // 4
    rows = np.pad(zeros, ((0, -len(zeros) % in_word), (0, 0))).astype(np.uint32)
    shifts = 4 * np.arange(in_word, dtype=np.uint32)
    grouped = rows.reshape(-1, in_word, zeros.shape[1]) << shifts[:, None]
    words: NDArray[np.uint32] = np.bitwise_or.reduce(grouped, 1)
    return words.view(np.int32)


def _config(specs: Sequence[ParamSpec], scheme: str) -> dict[str, Any]:
    own = {
        "int8": {"num_bits": 8, "symmetric": True, "strategy": "channel", "group_size": None},
        "int4": {"num_bits": 4, "symmetric": False, "strategy": "group", "group_size": GROUP},
    }[scheme]
    linear = [s.name.removesuffix(".weight") for s in specs if s.kind == "linear"]
    apart = [name for name in linear if ".layers." not in name and not name.endswith(".bias")]
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        # A tied head has no parameter, but it is a layer.
        "ignore": list(dict.fromkeys([*apart, "lm_head"])),
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"type": "int", "dynamic": False, **own},
                "input_activations": None,
                "output_activations": None,
            }
        },
    }
