"""Quantised checkpoints made by hand, number by number, and the weights that they stand for.

What is written here goes through Python's own integers of any size, bit by bit, and what is
expected is computed one number at a time, so that a reader is tested by neither its own tables nor
shifts.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.safetensors_format import PendingTensor, write_safetensors
from opt_core.config import OPTConfig
from opt_core.params import ParamSpec, param_specs

Array = NDArray[Any]

CONFIG = OPTConfig(
    vocab_size=37,
    hidden_size=32,
    num_attention_heads=4,
    num_hidden_layers=1,
    ffn_dim=64,
    max_position_embeddings=12,
)
"""Widths that GPTQ's 3 bits take, which come in 32s."""
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""The values of nf4 (arXiv 2305.14314, appendix E)."""
FP4 = [0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4]
"""The values of fp4 without their sign: 0, 0.0625, 8, 12, 4, 6, 2 and 3 twelfths."""


class Made(NamedTuple):
    """A checkpoint's contents.

    Attributes:
        tensors: What its file holds.
        expected: The weights, by canonical name.
        settings: Its `quantization_config`.
    """

    tensors: dict[str, Array]
    expected: dict[str, Array]
    settings: dict[str, Any]

    def write(self, folder: Path, config: OPTConfig = CONFIG) -> Path:
        """Writes config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        values = config.to_dict() | {"quantization_config": self.settings}
        (folder / "config.json").write_text(json.dumps(values))
        write_tensors(folder / "model.safetensors", self.tensors)
        return folder


def write_tensors(path: Path, tensors: dict[str, Array]) -> None:
    """Writes a safetensors file."""
    write_safetensors(
        path, [PendingTensor(n, a.shape, a.dtype, lambda a=a: a) for n, a in tensors.items()]
    )


def words(numbers: Iterable[int], bits: int) -> list[int]:
    """Numbers in signed words of 32 bits, the first one in the lowest bits."""
    every = [int(number) for number in numbers]
    whole = sum(number << (i * bits) for i, number in enumerate(every))
    count = -(-len(every) * bits // 32)
    found = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in found]


def rows_of_words(numbers: Array, bits: int) -> Array:
    """Each row of a matrix in words."""
    return np.array([words(row, bits) for row in numbers], np.int32)


def is_layer(spec: ParamSpec) -> bool:
    """Whether it is a weight of a layer, which every library quantises."""
    return ".layers." in spec.name and len(spec.shape) == 2


def make(
    layer: Callable[[ParamSpec, Any], tuple[dict[str, Array], Array]], **settings: Any
) -> Made:
    """A checkpoint.

    Args:
        layer: Makes the tensors of a layer's weight, by their last names, and the weight.
        **settings: Its `quantization_config`.
    """
    random = np.random.default_rng(7)
    tensors: dict[str, Array] = {}
    expected: dict[str, Array] = {}
    for spec in param_specs(CONFIG):
        if is_layer(spec):
            parts, expected[spec.name] = layer(spec, random)
            stem = spec.name.removesuffix(".weight")
            tensors |= {f"{stem}.{leaf}": array for leaf, array in parts.items()}
        else:
            tensors[spec.name] = random.normal(size=spec.shape).astype(np.float16)
            expected[spec.name] = tensors[spec.name]
    return Made(tensors, expected, settings)


def on_grid(steps: Array, zeros: Array, scales: Array, groups: list[int]) -> Array:
    """The weight (O, I) of steps (O, I), zero points and scales (O, G), in exact arithmetic."""
    return np.array(
        [
            [
                (int(steps[o, i]) - int(zeros[o, g])) * float(scales[o, g])
                for i, g in enumerate(groups)
            ]
            for o in range(len(steps))
        ]
    ).astype(np.float32)


def in_groups(width: int, size: int) -> list[int]:
    """The group of each input, in order."""
    return [0 if size == -1 else i // size for i in range(width)]


def random_grid(
    random: Any, shape: tuple[int, ...], bits: int, count: int
) -> tuple[Array, Array, Array]:
    """Steps, zero points and scales, the extremes of each among them."""
    top = (1 << bits) - 1
    steps = random.integers(0, top + 1, shape)
    zeros = random.integers(0, top + 1, (shape[0], count))
    steps[0, :2], zeros[0, 0], zeros[1, 0] = (0, top), 0, top
    return steps, zeros, random.normal(size=(shape[0], count)).astype(np.float16)


def gptq(bits: int = 4, size: int = 16, kind: str = "gptq", order: str | None = "random") -> Made:
    """GPTQ's: `order` is that of the groups' inputs, "sorted", "random" (act-order) or None."""

    def layer(spec: ParamSpec, random: Any) -> tuple[dict[str, Array], Array]:
        width = spec.shape[1]
        groups = in_groups(width, size)
        if order == "random":
            random.shuffle(groups)
        steps, zeros, scales = random_grid(random, spec.shape, bits, max(groups) + 1)
        stored = zeros if kind == "gptq_v2" else (zeros - 1) % (1 << bits)
        parts: dict[str, Array] = {
            "qweight": rows_of_words(steps, bits).T,
            "qzeros": rows_of_words(stored.T, bits),
            "scales": scales.T,
        }
        if order is not None:
            parts["g_idx"] = np.array(groups, np.int32)
        return parts, on_grid(steps, zeros, scales, groups)

    return make(layer, quant_method="gptq", bits=bits, group_size=size, checkpoint_format=kind)


def awq(size: int = 16) -> Made:
    """AWQ's: of eight outputs, word by word, 0, 2, 4, 6, 1, 3, 5 and 7 follow one another."""

    def layer(spec: ParamSpec, random: Any) -> tuple[dict[str, Array], Array]:
        groups = in_groups(spec.shape[1], size)
        steps, zeros, scales = random_grid(random, spec.shape, 4, max(groups) + 1)
        order = [8 * (o // 8) + [0, 2, 4, 6, 1, 3, 5, 7][o % 8] for o in range(spec.shape[0])]
        parts = {
            "qweight": rows_of_words(steps[order].T, 4),
            "qzeros": rows_of_words(zeros[order].T, 4),
            "scales": scales.T,
        }
        return parts, on_grid(steps, zeros, scales, groups)

    return make(layer, quant_method="awq", bits=4, group_size=size, version="gemm", zero_point=True)


def llm_int8() -> Made:
    """bitsandbytes' eight bits."""

    def layer(spec: ParamSpec, random: Any) -> tuple[dict[str, Array], Array]:
        weight = random.integers(-127, 128, spec.shape).astype(np.int8)
        largest = np.abs(random.normal(size=spec.shape[0])).astype(np.float32)
        scales = np.array([np.float32(value) / np.float32(127) for value in largest])
        expected = np.array([[q * s for q in row] for row, s in zip(weight, scales, strict=True)])
        parts = {"weight": weight, "SCB": largest, "weight_format": np.array(0, np.uint8)}
        return parts, expected.astype(np.float32)

    return make(layer, quant_method="bitsandbytes", load_in_8bit=True)


def four_bits(
    kind: str = "nf4", blocksize: int = 64, nested: bool = False, storage: Any = np.uint8
) -> Made:
    """bitsandbytes' nf4 and fp4, in double quantisation or not."""
    table = NF4 if kind == "nf4" else [*FP4, *(-value for value in FP4)]
    values = np.array(table, np.float32)

    def layer(spec: ParamSpec, random: Any) -> tuple[dict[str, Array], Array]:
        places = random.integers(0, 16, spec.shape).reshape(-1)
        count = -(-len(places) // blocksize)
        state: dict[str, Any] = {
            "quant_type": kind, "blocksize": blocksize, "dtype": "float16",
            "shape": list(spec.shape),
        }  # fmt: skip
        packed = [int(high) << 4 | int(low) for high, low in places.reshape(-1, 2)]
        parts: dict[str, Array] = {
            "weight": np.array(packed, np.uint8).view(storage)[:, None],
            "weight.quant_map": values,
        }
        if nested:
            offset, inner = 0.37, 4
            codes = np.sort(random.uniform(-1, 1, 256)).astype(np.float32)
            of_blocks = random.integers(0, 256, count).astype(np.uint8)
            largest = random.uniform(0.1, 1, -(-count // inner)).astype(np.float32)
            absmax = [
                codes[place] * largest[i // inner] + np.float32(offset)
                for i, place in enumerate(of_blocks)
            ]
            parts |= {
                "weight.absmax": of_blocks, "weight.nested_absmax": largest,
                "weight.nested_quant_map": codes,
            }  # fmt: skip
            state |= {
                "nested_blocksize": inner, "nested_dtype": "float32", "nested_offset": offset,
            }  # fmt: skip
        else:
            absmax = list(random.uniform(0.1, 1, count).astype(np.float32))
            parts["weight.absmax"] = np.array(absmax)
        blob = np.frombuffer(json.dumps(state).encode(), np.uint8)
        parts[f"weight.quant_state.bitsandbytes__{kind}"] = blob
        flat = [values[place] * absmax[i // blocksize] for i, place in enumerate(places)]
        return parts, np.array(flat, np.float32).reshape(spec.shape)

    return make(
        layer, quant_method="bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
    )  # fmt: skip


def packed(
    bits: int = 4, size: int | None = 16, symmetric: bool = True, order: bool = False
) -> Made:
    """compressed-tensors' "pack-quantized"; without a group's size, one scale to a channel."""

    def layer(spec: ParamSpec, random: Any) -> tuple[dict[str, Array], Array]:
        groups = in_groups(spec.shape[1], size or -1)
        if order:
            random.shuffle(groups)
        steps, zeros, scales = random_grid(random, spec.shape, bits, max(groups) + 1)
        parts: dict[str, Array] = {
            "weight_packed": rows_of_words(steps, bits),
            "weight_scale": scales,
            "weight_shape": np.array(spec.shape),
        }
        if symmetric:
            zeros = np.full_like(zeros, 1 << (bits - 1))
        else:
            parts["weight_zero_point"] = rows_of_words(zeros.T, bits).T
        if order:
            parts["weight_g_idx"] = np.array(groups, np.int32)
        return parts, on_grid(steps, zeros, scales, groups)

    return make(layer, **compressed("pack-quantized", bits, size, symmetric))


def unpacked(kind: str = "int-quantized", size: int | None = None, symmetric: bool = True) -> Made:
    """compressed-tensors' "int-quantized" and "naive-quantized", a byte to a number."""

    def layer(spec: ParamSpec, random: Any) -> tuple[dict[str, Array], Array]:
        groups = in_groups(spec.shape[1], size or -1)
        steps, zeros, scales = random_grid(random, spec.shape, 8, max(groups) + 1)
        parts: dict[str, Array] = {
            "weight": (steps - 128).astype(np.int8),
            "weight_scale": scales,
        }
        if symmetric:
            zeros = np.full_like(zeros, 128)
        else:
            parts["weight_zero_point"] = (zeros - 128).astype(np.int8)
        return parts, on_grid(steps, zeros, scales, groups)

    return make(layer, **compressed(kind, 8, size, symmetric))


def float8(strategy: str = "channel") -> Made:
    """compressed-tensors' "float-quantized", with one scale to a "tensor", "channel" or "block"."""
    block = {"tensor": (1 << 20, 1 << 20), "channel": (1, 1 << 20), "block": (24, 16)}[strategy]

    def layer(spec: ParamSpec, random: Any) -> tuple[dict[str, Array], Array]:
        weight = random.normal(size=spec.shape).astype(ml_dtypes.float8_e4m3fn)
        count = [-(-n // b) for n, b in zip(spec.shape, block, strict=True)]
        scales = random.uniform(0.1, 1, count).astype(np.float32)
        expected = [
            [np.float32(q) * scales[o // block[0], i // block[1]] for i, q in enumerate(row)]
            for o, row in enumerate(weight)
        ]
        parts = {
            "weight": weight, "weight_scale": scales[0] if strategy == "tensor" else scales,
            "input_scale": np.ones(1, np.float32),
        }  # fmt: skip
        return parts, np.array(expected, np.float32)

    settings = compressed("float-quantized", 8, None, True)
    own = settings["config_groups"]["group_0"]
    own["weights"] |= {"type": "float", "strategy": strategy}
    if strategy == "block":
        own["weights"]["block_structure"] = list(block)
    own["input_activations"] = {"num_bits": 8, "type": "float", "dynamic": False}
    return make(layer, **settings)


def compressed(kind: str, bits: int, size: int | None, symmetric: bool) -> dict[str, Any]:
    """The settings of compressed-tensors."""
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": size,
        "strategy": "channel" if size is None else "group",
    }  # fmt: skip
    group: dict[str, Any] = {"targets": ["Linear"], "weights": weights}
    return {
        "quant_method": "compressed-tensors", "format": kind, "ignore": ["lm_head"],
        "quantization_status": "compressed", "config_groups": {"group_0": group},
    }  # fmt: skip
