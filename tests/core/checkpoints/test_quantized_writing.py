"""Our quantised weights in compressed-tensors' files: the very numbers, for others and for us."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.checkpoints.pretrained import open_pretrained
from opt_core.checkpoints.quantized.bits import pack_bits, unpack_bits
from opt_core.checkpoints.quantized.settings import (
    GPTQ,
    SIDE_FILE,
    CompressedTensors,
    WeightArguments,
    read_settings,
)
from opt_core.checkpoints.quantized.tensor import PackedTensor, stored_scheme
from opt_core.checkpoints.save import save_checkpoint, save_quantized_checkpoint
from opt_core.checkpoints.tensors import float_dtype
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, ConfigError
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import (
    SCHEMES,
    QuantizedTensor,
    quantize_array,
    scheme_of,
    unpack,
)
from tests.support.configs import CONFIGS
from tests.support.files.checkpoint_fixtures import random_weights
from tests.support.files.quantized_fixtures import CONFIG, is_layer, rows_of_words, words

VARIANTS = {
    **CONFIGS,
    "untied": CONFIGS["pre_ln"].replace(tie_word_embeddings=False),
    # Widths that neither a word of eight nor a byte of two divides, and several groups.
    "odd": CONFIGS["pre_ln"].replace(hidden_size=33, num_attention_heads=3, ffn_dim=131),
    "whole_groups": CONFIGS["pre_ln"].replace(hidden_size=64, ffn_dim=128),
}
EMBEDDING = "model.decoder.embed_tokens.weight"


def save(
    folder: Path, config: OPTConfig, scheme: str, dtype: str = "float32", **options: Any
) -> dict[str, Any]:
    """Writes a random model, and returns what it was given."""
    values: dict[str, Any] = dict(random_weights(config, dtype=dtype))
    for spec in param_specs(config):
        if kept := scheme_of(spec, scheme):
            values[spec.name] = quantize_array(spec.name, values[spec.name], kept)

    def fetch(spec: ParamSpec) -> Any:
        return values[spec.name]

    save_quantized_checkpoint(folder, config, fetch, param_specs(config), dtype, scheme, **options)
    return values


def raw(path: Path) -> dict[str, Any]:
    """A file's tensors, as the library reads them."""
    with safe_open(path, "np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def assert_same(ours: Any, theirs: Any) -> None:
    if not isinstance(theirs, QuantizedTensor):
        np.testing.assert_array_equal(ours, theirs)
        return
    assert (ours.scheme, ours.width) == (theirs.scheme, theirs.width)
    for name in ("values", "scales", "zeros"):
        mine, its = getattr(ours, name), getattr(theirs, name)
        assert (mine is None) == (its is None)
        if its is not None:
            np.testing.assert_array_equal(mine, its)
            assert (mine.dtype, mine.flags.c_contiguous) == (its.dtype, True)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_numbers_come_back_as_they_were(variant: str, scheme: str, tmp_path: Path):
    config = VARIANTS[variant]
    values = save(tmp_path / "new", config, scheme)
    source = open_pretrained("causal_lm", tmp_path / "new", "auto", None, None)
    assert (source.quantize, source.dtype) == (scheme, "float32")
    read = dict(source.stream(None))
    assert {spec.name for spec in read} == values.keys()
    for spec, found in read.items():
        assert_same(found, values[spec.name])
    floats = plan_load(open_checkpoint(tmp_path / "new"), config, "causal_lm").stream()
    for spec, array in floats:
        kept = values[spec.name]
        weight = kept.dequantize() if isinstance(kept, QuantizedTensor) else kept
        np.testing.assert_array_equal(array, weight)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ["odd", "post_ln"])
def test_others_find_each_number_where_compressed_tensors_has_it(
    variant: str, scheme: str, tmp_path: Path
):
    config, bits = VARIANTS[variant], 8 if scheme == "int8" else 4
    values = save(tmp_path, config, scheme, "float16")
    stored = raw(tmp_path / "model-00001-of-00001.safetensors")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == stored.keys()
    for spec in param_specs(config):
        kept = values[spec.name]
        if ".layers." not in spec.name or not isinstance(kept, QuantizedTensor):
            weight = kept.dequantize() if isinstance(kept, QuantizedTensor) else kept
            np.testing.assert_array_equal(stored.pop(spec.name), weight.astype(np.float16))
            continue
        packed, scales = stored.pop(f"{spec.name}_packed"), stored.pop(f"{spec.name}_scale")
        assert stored.pop(f"{spec.name}_shape").tolist() == list(spec.shape)
        size = 64 if scheme == "int4" else spec.shape[1]
        zeros = np.full(scales.shape, 1 << (bits - 1))
        if scheme == "int4":
            columns = stored.pop(f"{spec.name}_zero_point").T
            zeros = np.array([_numbers(c, bits, spec.shape[0]) for c in columns]).T
        weight = kept.dequantize()
        for o, row in enumerate(packed):
            steps = _numbers(row, bits, spec.shape[1])
            assert words(steps, bits) == row.tolist()  # and nothing but zeros behind them
            for i, step in enumerate(steps):
                g = i // size
                value = np.float32(step - int(zeros[o, g])) * scales[o, g]
                assert value == weight[o, i]
    assert not stored


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_others_find_each_number_where_gptq_has_it(bits: int, tmp_path: Path):
    config = CONFIG.replace(ffn_dim=160)  # two groups of 64 and a part of one
    scheme, size = ("int8", None) if bits == 8 else ("int4", 64)
    kept: dict[str, Any] = dict(random_weights(config))
    for spec in param_specs(config):
        if is_layer(spec):
            numbers = quantize_array(spec.name, kept[spec.name], scheme)
            kept[spec.name] = numbers if bits != 3 else of_three_bits(numbers)
    save_quantized_checkpoint(
        tmp_path, config, lambda s: kept[s.name], param_specs(config), "float32", scheme,
        gptq_bits=bits,
    )  # fmt: skip
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert read_settings(settings) == GPTQ(bits, size, is_v2=True)
    stored = raw(tmp_path / "model.safetensors")
    for spec in param_specs(config):
        if not is_layer(spec):
            np.testing.assert_array_equal(stored.pop(spec.name), kept[spec.name])
            continue
        layer, (outputs, width) = spec.name.removesuffix(".weight"), spec.shape
        steps = np.array([_numbers(c, bits, width) for c in stored.pop(f"{layer}.qweight").T])
        zeros = np.array([_numbers(r, bits, outputs) for r in stored.pop(f"{layer}.qzeros")])
        groups, scales = stored.pop(f"{layer}.g_idx"), stored.pop(f"{layer}.scales")
        assert groups.tolist() == [i // (size or width) for i in range(width)]
        weight = (steps - zeros[groups].T).astype(np.float32) * scales[groups].T
        np.testing.assert_array_equal(weight, kept[spec.name].dequantize())
    assert not stored
    read = open_checkpoint(tmp_path).tensors
    for spec in filter(is_layer, param_specs(config)):
        weight = read[spec.name]
        assert isinstance(weight, PackedTensor)
        assert_same(weight.numbers(scheme), kept[spec.name])


def of_three_bits(numbers: QuantizedTensor) -> QuantizedTensor:
    """The same numbers, those above 7 halved."""
    assert numbers.zeros is not None
    steps = unpack(numbers.values)[:, : numbers.width]
    low = replace(numbers, zeros=numbers.zeros // 2)
    return low.rounded(np.where(steps > 7, steps // 2, steps))


def test_gptqs_words_are_filled_or_refused(tmp_path: Path):
    odd = VARIANTS["odd"]
    specs, weights = param_specs(odd), random_weights(odd)
    with pytest.raises(ConfigError, match=r"k_proj.weight: GPTQ's words .* received \[33, 33\]"):
        save_quantized_checkpoint(
            *(tmp_path / "new", odd, lambda s: weights[s.name], specs, "float32", "int4"),
            gptq_bits=4,
        )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 75])
def test_what_is_packed_into_words_can_be_had_back(bits: int, count: int):
    numbers = np.random.default_rng(bits).integers(0, 1 << bits, (count, 3)).astype(np.uint8)
    packed = pack_bits(numbers, bits)
    assert packed.T.tolist() == rows_of_words(numbers.T, bits).tolist()
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), numbers)


def _numbers(row: Any, bits: int, count: int) -> list[int]:
    whole = sum((int(word) & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(row))
    return [whole >> (bits * i) & ((1 << bits) - 1) for i in range(count)]


def test_settings_are_those_of_other_libraries(tmp_path: Path):
    for scheme, expected in {
        "int4": WeightArguments("pack-quantized", 4, False, False, "group", 64),
        "int8": WeightArguments("pack-quantized", 8, False, True, "channel"),
    }.items():
        save(tmp_path / scheme, CONFIGS["post_ln"], scheme)
        values = json.loads((tmp_path / scheme / "config.json").read_text())
        given = values["quantization_config"]
        assert read_settings(given) == CompressedTensors((expected,), rounds_inputs=False)
        ignored = ["model.decoder.project_out", "model.decoder.project_in", "lm_head"]
        assert given["ignore"] == ignored
        assert values["architectures"] == ["OPTForCausalLM"]


def test_weights_of_four_bits_stay_in_the_file_until_they_are_used(tmp_path: Path):
    save(tmp_path, VARIANTS["whole_groups"], "int4")
    for name, tensor in open_checkpoint(tmp_path).tensors.items():
        if isinstance(tensor, PackedTensor):
            kept = tensor.numbers("int8" if name == EMBEDDING else "int4")
            assert kept is not None
            view = tensor.parts[0].read()
            assert kept.values.__array_interface__["data"] == view.__array_interface__["data"]


def test_files_are_split_by_size_and_take_the_place_of_others(tmp_path: Path):
    config = CONFIGS["pre_ln"]
    save(tmp_path, config, "int4", max_shard_size=4000)
    names = {path.name for path in tmp_path.iterdir()}
    assert len(names) > 5
    assert {SIDE_FILE, "model.safetensors.index.json"} <= names
    values = save(tmp_path, config, "int8", "float16")
    shard = "model-00001-of-00001.safetensors"
    assert {p.name for p in tmp_path.iterdir()} == {
        "config.json", SIDE_FILE, shard, "model.safetensors.index.json",
    }  # fmt: skip
    checkpoint = open_checkpoint(tmp_path)
    assert [file.name for file in checkpoint.files] == [shard, SIDE_FILE]
    assert checkpoint.quantization == "compressed-tensors"
    specs = param_specs(config)
    floats = {s.name: lambda s=s: np.zeros(s.shape, np.float32) for s in specs}
    assert values.keys() == floats.keys()
    save_checkpoint(tmp_path, config, floats, specs, "float32")
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    assert stored_scheme(plan_load(open_checkpoint(tmp_path), config, "causal_lm").entries) is None


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_beside_has_to_be_of_the_same_weights(dtype: str, tmp_path: Path):
    config = CONFIGS["pre_ln"]
    values = save(tmp_path / "a", config, "int4", dtype)
    assert open_pretrained("causal_lm", tmp_path / "a", "auto", None, None).quantize == "int4"
    random = np.random.default_rng(5)

    def other(spec: ParamSpec) -> Any:
        if spec.name != EMBEDDING:
            return values[spec.name]
        changed = random.normal(size=spec.shape).astype(np.float32)
        return quantize_array(spec.name, changed.astype(float_dtype(dtype)), "int8")

    save_quantized_checkpoint(tmp_path / "b", config, other, param_specs(config), dtype, "int4")
    side = tmp_path / "a" / SIDE_FILE
    side.write_bytes((tmp_path / "b" / SIDE_FILE).read_bytes())
    for quantize in (None, "int4"):
        plan = plan_load(open_checkpoint(tmp_path / "a"), config, "causal_lm")
        with pytest.raises(CheckpointError, match=f"{EMBEDDING} is not that of the other files"):
            list(plan.stream(quantize=quantize))
    side.unlink()
    source = open_pretrained("causal_lm", tmp_path / "a", "auto", None, None)
    assert source.quantize is None  # for its embedding is in floating point
    for spec, array in source.stream(None):
        kept = values[spec.name]
        if isinstance(kept, QuantizedTensor):
            kept = kept.dequantize().astype(array.dtype)
        np.testing.assert_array_equal(array, kept)


def test_layers_of_such_a_folder_keep_their_numbers_where_that_is_asked_for(tmp_path: Path):
    config = CONFIGS["pre_ln"]
    values = save(tmp_path, config, "int4")
    (tmp_path / SIDE_FILE).unlink()
    source = open_pretrained("causal_lm", tmp_path, "float32", None, "int4")
    for spec, found in source.stream(None):
        if spec.name != EMBEDDING:  # which is rounded anew
            assert_same(found, values[spec.name])
        else:
            np.testing.assert_allclose(found.dequantize(), values[spec.name].dequantize(), 1e-6)


def test_weights_are_not_rounded_twice(tmp_path: Path):
    save(tmp_path, CONFIGS["pre_ln"], "int4")
    assert open_pretrained("causal_lm", tmp_path, "float32", None, "int4").quantize == "int4"
    with pytest.raises(ConfigError, match="quantize: expected 'int4', which the weights are store"):
        open_pretrained("causal_lm", tmp_path, "float32", None, "int8")
