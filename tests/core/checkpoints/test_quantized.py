"""Quantised checkpoints of other libraries: the very weights that they stand for."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.checkpoints.quantized.bits import unpack_bits, words_for
from opt_core.checkpoints.quantized.tensor import PackedTensor, numbers_of
from opt_core.config import OPTConfig
from opt_core.errors import OPTError
from opt_core.quantization import SCHEMES
from tests.support.files import quantized_fixtures as files
from tests.support.files.quantized_fixtures import CONFIG, Made

Makes = Callable[[], Made]

CASES: dict[str, Makes] = {
    "gptq-2": lambda: files.gptq(2, 32),
    "gptq-3": lambda: files.gptq(3, 16),
    "gptq-3-no-order": lambda: files.gptq(3, -1, "gptq_v2", None),
    "gptq-4": lambda: files.gptq(4, 16),
    "gptq-4-sorted": lambda: files.gptq(4, 32, order="sorted"),
    "gptq-4-v2": lambda: files.gptq(4, 16, "gptq_v2"),
    "gptq-8": lambda: files.gptq(8, -1, order=None),
    "awq": lambda: files.awq(16),
    "awq-channel": lambda: files.awq(-1),
    "llm.int8": files.llm_int8,
    "nf4": files.four_bits,
    "nf4-nested": lambda: files.four_bits(nested=True),
    "nf4-as-bfloat16": lambda: files.four_bits(storage=ml_dtypes.bfloat16),
    "fp4": lambda: files.four_bits("fp4", 128),
    "fp4-nested": lambda: files.four_bits("fp4", 96, nested=True),
    "packed-4": files.packed,
    "packed-4-zeros": lambda: files.packed(4, 16, symmetric=False),
    "packed-4-order": lambda: files.packed(4, 16, symmetric=False, order=True),
    "packed-4-channel": lambda: files.packed(4, None, symmetric=False),
    "packed-3": lambda: files.packed(3, 20, symmetric=False),
    "packed-8": lambda: files.packed(8, None),
    "int8": files.unpacked,
    "int8-zeros": lambda: files.unpacked(symmetric=False),
    "naive-groups": lambda: files.unpacked("naive-quantized", 24, symmetric=False),
    "float8-tensor": lambda: files.float8("tensor"),
    "float8-channel": files.float8,
    "float8-block": lambda: files.float8("block"),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_that_the_numbers_stand_for(case: str, tmp_path: Path):
    made = CASES[case]()
    folder = made.write(tmp_path)
    config = OPTConfig.from_pretrained(folder)
    assert (config, hasattr(config, "quantization_config")) == (CONFIG, False)
    plan = plan_load(open_checkpoint(folder), config, "causal_lm")
    for (spec, tensor), (_, array) in zip(
        sorted(plan.entries, key=lambda e: e[0].name),
        sorted(plan.stream(), key=lambda e: e[0].name),
        strict=True,
    ):
        expected = made.expected[spec.name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, expected.dtype)
        np.testing.assert_array_equal(array, expected)
        np.testing.assert_array_equal(tensor.rows(3, 8).read(), expected[3:8])
        if files.is_layer(spec):
            assert isinstance(tensor, PackedTensor)
            stored = (a.nbytes for n, a in made.tensors.items() if n.startswith(spec.name[:-6]))
            bias = made.tensors[spec.name.replace("weight", "bias")].nbytes
            aside = 4 if case.startswith("float8") else 0
            assert tensor.stored_nbytes == sum(stored) - bias - aside


def test_blocks_of_rows_are_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("opt_core.checkpoints.quantized.tensor._BLOCK", 5 * 32)
    for case in ("gptq-3", "awq", "nf4-nested", "packed-3", "float8-block"):
        made = CASES[case]()
        checkpoint = open_checkpoint(made.write(tmp_path / case))
        for name, tensor in checkpoint.tensors.items():
            np.testing.assert_array_equal(tensor.read(), made.expected[name])


@pytest.mark.parametrize("bits", range(1, 9))
def test_numbers_of_any_bits_come_out_of_their_words(bits: int):
    for count in (1, 31, 32, 33, 75):
        numbers = np.random.default_rng(bits).integers(0, 1 << bits, (count, 3))
        packed = files.rows_of_words(numbers.T, bits).T
        assert len(packed) == words_for(count, bits)
        np.testing.assert_array_equal(unpack_bits(packed, bits, count), numbers)


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json"])
def test_settings_may_be_in_a_file_of_their_own(name: str, tmp_path: Path):
    made = files.gptq() if name == "quantize_config.json" else files.awq()
    folder = made.write(tmp_path)
    (folder / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    settings = {"bits": 4, "group_size": 16, "desc_act": True, "sym": False}
    if name == "quant_config.json":
        settings = {"w_bit": 4, "q_group_size": 16, "version": "GEMM", "zero_point": True}
    (folder / name).write_text(json.dumps(settings))
    for key, tensor in open_checkpoint(folder).tensors.items():
        np.testing.assert_array_equal(tensor.read(), made.expected[key])


def test_a_scheme_with_settings_but_no_quantised_layer_is_what_it_is(tmp_path: Path):
    made = files.gptq()
    Made(made.expected, made.expected, made.settings).write(tmp_path)
    plan = plan_load(open_checkpoint(tmp_path), CONFIG, "causal_lm")
    for spec, array in plan.stream():
        np.testing.assert_array_equal(array, made.expected[spec.name])


def test_the_layer_s_tensors_say_which_group_of_settings_it_is_of(tmp_path: Path):
    one, other = files.packed(4, 16, symmetric=False), files.packed(3, None)
    name = "model.decoder.layers.0.fc1"
    mixed = {n: t for n, t in one.tensors.items() if not n.startswith(f"{name}.weight")}
    mixed |= {n: t for n, t in other.tensors.items() if n.startswith(f"{name}.weight")}
    groups = one.settings["config_groups"] | {
        "group_1": other.settings["config_groups"]["group_0"] | {"targets": ["re:.*fc1$"]}
    }
    Made(mixed, {}, one.settings | {"config_groups": groups}).write(tmp_path)
    for key, tensor in open_checkpoint(tmp_path).tensors.items():
        expected = (other if key == f"{name}.weight" else one).expected
        if files.is_layer(next(s for s in files.param_specs(CONFIG) if s.name == key)):
            np.testing.assert_array_equal(tensor.read(), expected[key])


def test_rounding_of_inputs_is_noted_and_not_done(tmp_path: Path):
    checkpoint = open_checkpoint(files.float8().write(tmp_path))
    assert len(checkpoint.notes) == 1
    assert "round the inputs" in checkpoint.notes[0]


@pytest.mark.parametrize(
    ("case", "scheme"),
    [
        ("gptq-3", None), ("gptq-4-v2", None), ("gptq-8", "int8"), ("awq-channel", "both"),
        ("llm.int8", "int8"), ("packed-4-channel", "both"), ("packed-8", "int8"),
        ("int8", "int8"), ("nf4", None), ("float8-channel", None),
    ],
)  # fmt: skip
def test_numbers_are_kept_where_ours_have_a_place_for_them(
    case: str, scheme: str | None, tmp_path: Path
):
    """Groups of our tests are smaller than ours of 64; channels are a group of any size."""
    made = CASES[case]()
    for name, tensor in open_checkpoint(made.write(tmp_path)).tensors.items():
        if not isinstance(tensor, PackedTensor):
            continue
        for wanted in SCHEMES:
            kept = tensor.numbers(wanted)
            if case == "gptq-8" and kept is None:  # a zero point at one end: 9 bits from it
                continue
            assert (kept is not None) == (scheme in (wanted, "both")), (name, wanted)
            if kept is not None:
                np.testing.assert_array_equal(kept.dequantize(), made.expected[name])
                again = numbers_of(name, tensor, wanted)
                np.testing.assert_array_equal(again.values, kept.values)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "hqq"}, "quantised by 'hqq' are not read; expected gptq, awq, bitsandb"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"bits": 4}, "quantised by an unnamed method"),
        ({"quant_method": ["gptq"]}, "quantised by"),
        ("int4", "expected an object, received 'int4'"),
        ({"quant_method": "gptq", "bits": 5}, "gptq with bits=5 is not read; expected 2, 3, 4 or"),
        ({"quant_method": "gptq", "bits": True}, "bits=True"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"}, "pack_dtype='int16'"),
        ({"quant_method": "gptq", "bits": 4, "group_size": -3}, "group_size: expected -1 or at l"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 0}, "received 0"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:fc1": {"bits": 8}}}, r"'\+:fc1'"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": 5}, "own for 5 is not read"),
        ({"quant_method": "awq", "bits": 8}, 'awq with bits=8 .* quantize="int8"'),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv' is not read"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "version 'llm-awq'"),
        ({"quant_method": "bitsandbytes"}, "expected one of load_in_8bit and load_in_4bit"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "expected one of load_in_8bit"),
        ({"quant_method": "compressed-tensors"}, "expected config_groups, received None"),
        (files.compressed("nvfp4-pack-quantized", 4, 16, True), "format 'nvfp4-pack-quantized'"),
        (files.compressed("pack-quantized", 9, 16, True), "with 9 bits of type 'int'"),
        (files.compressed("pack-quantized", 4, 0, True), "group_size: expected -1 or at least 1"),
        (files.compressed("float-quantized", 8, None, True), "float-quantized with 8 bits of type"),
        (
            files.compressed("pack-quantized", 4, 16, True)
            | {"sparsity_config": {"format": "sparse-24-bitmask"}},
            "with a sparsity_config is not read",
        ),
        (
            files.compressed("pack-quantized", 4, 16, True)
            | {"transform_config": {"config_groups": {"a": {}}}},
            "with a transform_config is not read",
        ),
        (
            files.compressed("pack-quantized", 4, 16, True) | {"config_groups": {"W4A16": ["x"]}},
            "W4A16: expected an object",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_schemes_that_nobody_here_reads_are_refused_by_name(
    settings: Any, message: str, tmp_path: Path
):
    folder = Made(files.gptq().tensors, {}, settings).write(tmp_path)
    for read in (OPTConfig.from_pretrained, open_checkpoint):
        with pytest.raises(OPTError, match=message) as error:
            read(folder)
        assert str(error.value).startswith(f"{folder / 'config.json'}: quantization_config: ")
        assert "\n" not in str(error.value)
