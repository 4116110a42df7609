"""Quantised checkpoints that lie: one line names file, tensor, what was expected and received."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from tests.support.files import quantized_fixtures as files
from tests.support.files.quantized_fixtures import CONFIG, Made

FC1 = "model.decoder.layers.0.fc1"  # (64, 32)
Change = Callable[[Any], Any]


def without(array: Any) -> None:
    """No such tensor."""


def one_is(value: Any, at: Any = (1, 1)) -> Change:
    """A number is another."""

    def change(array: Any) -> Any:
        array = array.copy()
        array[at] = value
        return array

    return change


def state(**changes: Any) -> Change:
    """Another text in nf4's description of itself; None takes a key out."""

    def change(blob: Any) -> Any:
        values = json.loads(blob.tobytes()) | changes
        kept = {key: value for key, value in values.items() if value is not None}
        return np.frombuffer(json.dumps(kept).encode(), np.uint8)

    return change


def text(content: bytes) -> Change:
    return lambda blob: np.frombuffer(content, np.uint8)


STATE = "weight.quant_state.bitsandbytes__nf4"
MANY = 1 << 40
CASES: list[tuple[Callable[[], Made], str, Change, str]] = [
    (files.gptq, "qweight", lambda a: a[:, :-8], r"scales: expected shape \[any, 56\], .* 64\]"),
    (files.gptq, "qweight", lambda a: a[:-1], r"g_idx: expected shape \[24\], received \[32\]"),
    (files.gptq, "qweight", lambda a: a.astype(np.int64), "expected int32 numbers, received int64"),
    (files.gptq, "qweight", lambda a: a.view(np.float32), "received float32"),
    (files.gptq, "qweight", lambda a: a.reshape(-1), r"expected shape \[any, any\], received \[25"),
    (lambda: files.gptq(3), "qweight", lambda a: a[:-1], "multiple of 3 words"),
    (files.gptq, "qzeros", lambda a: a[:, :-1], r"expected shape \[2, 8\], received \[2, 7\]"),
    (files.gptq, "qzeros", without, "qzeros: it is missing"),
    (files.gptq, "scales", lambda a: a[:-1], r"expected 2 groups of 16 inputs for 32.*\[1, 64"),
    (files.gptq, "scales", lambda a: a.astype(np.int8), "expected float32 or float16 or"),
    (files.gptq, "scales", one_is(np.nan), "expected finite numbers, received NaN or infinite"),
    (files.gptq, "scales", one_is(-np.inf), "expected finite numbers, received NaN or infinite"),
    (files.gptq, "g_idx", one_is(2, 5), r"expected groups 0\.\.1, received 2"),
    (files.gptq, "g_idx", one_is(-1, 5), r"expected groups 0\.\.1, received -1"),
    (files.gptq, "g_idx", one_is(1 << 30, 5), "received 1073741824"),
    (files.gptq, "g_idx", lambda a: a[:-1], r"expected shape \[32\], received \[31\]"),
    (files.gptq, "g_idx", lambda a: a.astype(np.float32), "int32 or int64 numbers, received float"),
    (files.awq, "qweight", lambda a: a.T.copy(), r"scales: expected shape \[any, 256\]"),
    (files.awq, "qzeros", lambda a: a[:1], r"expected shape \[2, 8\], received \[1, 8\]"),
    (files.awq, "qzeros", without, "qzeros: it is missing"),
    (files.awq, "scales", lambda a: np.concatenate((a, a)), "expected 2 groups of 16"),
    (files.awq, "scales", one_is(np.inf), "expected finite numbers"),
    (files.llm_int8, "SCB", lambda a: a[:-1], r"expected shape \[64\], received \[63\]"),
    (files.llm_int8, "SCB", one_is(np.nan, 3), "expected finite numbers"),
    (files.llm_int8, "weight", lambda a: a.view(np.uint8), "expected int8 numbers, received uint8"),
    (files.llm_int8, "weight", without, "weight: it is missing"),
    (files.llm_int8, "weight_format", lambda a: a + np.uint8(2), r"expected 0 \(rows.*received 2"),
    (files.four_bits, "weight", lambda a: a[:-1], r"expected 1024 bytes for \[64, 32\], .* 1023"),
    (files.four_bits, "weight", lambda a: a.astype(np.int32), "numbers, received int32"),
    (files.four_bits, "weight.absmax", lambda a: a[:-1], r"expected 32 numbers, received \[31\]"),
    (files.four_bits, "weight.absmax", one_is(np.inf, 3), "expected finite numbers"),
    (files.four_bits, "weight.absmax", lambda a: a.astype(np.uint8), "received uint8"),
    (files.four_bits, "weight.quant_map", lambda a: a[:-1], r"expected shape \[16\], .*\[15"),
    (files.four_bits, "weight.quant_map", one_is(np.nan, 3), "expected finite numbers"),
    (files.four_bits, STATE, text(b'{"blocksize": 6'), "quant_state.*not JSON|JSON"),
    (files.four_bits, STATE, text(b"[64]"), "expected a JSON object"),
    (files.four_bits, STATE, text(b"\xff\xfe"), STATE),
    (files.four_bits, STATE, state(shape=[MANY, MANY]), "expected the shape of a matrix, received"),
    (files.four_bits, STATE, state(shape=[64, 31]), "expected 992 bytes"),
    (files.four_bits, STATE, state(shape=[64, -32]), "expected the shape of a matrix"),
    (files.four_bits, STATE, state(shape=[2048]), "expected the shape of a matrix"),
    (files.four_bits, STATE, state(shape=None), "expected the shape of a matrix, received None"),
    (files.four_bits, STATE, state(blocksize=0), r"expected blocksize of 1..1048576, received 0"),
    (files.four_bits, STATE, state(blocksize="64"), "received '64'"),
    (files.four_bits, STATE, state(quant_type="fp4"), "expected quant_type 'nf4', received 'fp4'"),
    (
        lambda: files.four_bits(nested=True), STATE, state(nested_offset=float("inf")),
        "expected a finite nested_offset|JSON",
    ),
    (
        lambda: files.four_bits(nested=True), STATE, state(nested_blocksize=-4),
        "expected nested_blocksize",
    ),
    (
        lambda: files.four_bits(nested=True), "weight.nested_absmax", lambda a: a[:-1],
        r"expected 8 numbers, received \[7\]",
    ),
    (
        lambda: files.four_bits(nested=True), "weight.nested_quant_map", lambda a: a[:16],
        r"expected shape \[256\], received \[16\]",
    ),
    (files.packed, "weight_shape", one_is(MANY, 0), "expected the shape of a matrix, received"),
    (files.packed, "weight_shape", one_is(-64, 0), "expected the shape of a matrix"),
    (files.packed, "weight_shape", one_is(63, 0), r"expected shape \[63, 4\], received \[64, 4\]"),
    (files.packed, "weight_shape", one_is(40, 1), r"expected shape \[64, 5\], received \[64, 4\]"),
    (files.packed, "weight_shape", without, "weight_shape: it is missing"),
    (files.packed, "weight_packed", lambda a: a[:, :-1], r"expected shape \[64, 4\]"),
    (files.packed, "weight_packed", lambda a: a.view(np.float32), "expected int32 numbers"),
    (files.packed, "weight_scale", lambda a: a[:, :1], r"expected shape \[64, 2\], .*\[64, 1\]"),
    (files.packed, "weight_scale", one_is(np.nan), "expected finite numbers"),
    (
        lambda: files.packed(symmetric=False), "weight_zero_point", lambda a: a[:-1],
        r"expected shape \[8, 2\], received \[7, 2\]",
    ),
    (
        lambda: files.packed(symmetric=False), "weight_zero_point", without,
        "weight_zero_point: it is missing",
    ),
    (
        lambda: files.packed(order=True), "weight_g_idx", one_is(-2, 5),
        r"expected groups 0\.\.1, received -2",
    ),
    (files.unpacked, "weight", lambda a: a.astype(np.int32), "int8 numbers, received int32"),
    (files.float8, "weight", one_is(np.nan), "expected finite float8, received NaN"),
    (
        files.float8, "weight", lambda a: a.astype(ml_dtypes.bfloat16),
        "expected float8_e4m3fn numbers, received bfloat16",
    ),
    (lambda: files.float8("block"), "weight_scale", lambda a: a[1:], r"expected shape \[3, 2\]"),
]  # fmt: skip


def test_there_are_many():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("make", "leaf", "change", "message"), CASES)
def test_what_cannot_be_a_weight_is_refused_in_one_line(
    make: Callable[[], Made], leaf: str, change: Change, message: str, tmp_path: Path
):
    made = make()
    name = f"{FC1}.{leaf}"
    changed = change(made.tensors[name])
    tensors = {n: t for n, t in made.tensors.items() if n != name or changed is not None}
    if changed is not None:
        tensors[name] = changed
    folder = Made(tensors, {}, made.settings).write(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        list(plan_load(open_checkpoint(folder), CONFIG, "causal_lm").stream())
    told = str(error.value)
    assert str(folder) in told
    assert FC1 in told
    assert "\n" not in told


def test_a_weight_of_another_size_does_not_fit_the_configuration(tmp_path: Path):
    made = files.gptq()
    config = CONFIG.replace(ffn_dim=72)
    with pytest.raises(CheckpointError, match=r"fc1.weight \(expected \[72, 32\], received"):
        plan_load(open_checkpoint(made.write(tmp_path, config)), config, "causal_lm")


@pytest.mark.parametrize("make", [files.gptq, files.awq, files.llm_int8, files.packed])
def test_integers_are_never_taken_for_weights_where_nothing_says_what_they_are(
    make: Callable[[], Made], tmp_path: Path
):
    made = make()._replace(settings={})
    made.write(tmp_path)
    with pytest.raises(CheckpointError, match="do not fit") as error:
        plan_load(open_checkpoint(tmp_path), OPTConfig.from_pretrained(tmp_path), "causal_lm")
    assert "no quantization_config" in str(error.value)


@pytest.mark.parametrize("make", [files.gptq, files.llm_int8, files.four_bits, files.packed])
def test_settings_of_another_scheme_are_refused(make: Callable[[], Made], tmp_path: Path):
    for other in (files.gptq(), files.awq(), files.llm_int8(), files.four_bits(), files.packed()):
        made = make()
        if made.settings == other.settings:
            continue
        folder = made._replace(settings=other.settings).write(tmp_path)
        with pytest.raises(CheckpointError) as error:
            plan_load(open_checkpoint(folder), CONFIG, "causal_lm")
        assert str(folder) in str(error.value)
