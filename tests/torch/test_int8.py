"""PyTorch's products in integers: what they are, and that a row depends on nothing but the row."""

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import opt_torch  # noqa: E402
from conversion.smoothquant import calibration_rows, smooth  # noqa: E402
from opt_core import OPTTokenizer  # noqa: E402
from opt_core.quantization import quantize_array  # noqa: E402
from opt_torch import _private, int8  # noqa: E402
from opt_torch.quantization import QuantizedLinear, QuantizedWeight  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_mask, make_prompts  # noqa: E402

if not _private.has_int8_linear():
    pytest.skip("this build of PyTorch has no FBGEMM", allow_module_level=True)

TOLERANCE = 1e-6
"""Of a product in integers against its definition in float64, relative to the largest result."""
MINI_ERROR = 0.04
"""Of `mini`'s logits in int8 against float32: root mean square, relative to their spread."""


def cpu_flags():
    """Names of the processor's instructions; none where the system does not say."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.split() for line in lines if line.startswith("flags")), [])


def make_linear(out, width, is_unsigned=False, has_bias=True, seed=0):
    rng = np.random.default_rng(seed)
    tensor = quantize_array("w", rng.standard_normal((out, width)).astype(np.float32), "int8")
    bias = torch.from_numpy(rng.standard_normal(out).astype(np.float32)) if has_bias else None
    layer = QuantizedLinear(QuantizedWeight(tensor, torch.float32), bias)
    layer.is_unsigned = is_unsigned
    return layer.eval(), tensor


@pytest.mark.parametrize("bits", sorted({7, int8.input_bits()}))
@pytest.mark.parametrize("is_unsigned", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("width", [1, 33, 768])
def test_rows_are_rounded_as_the_processor_allows(width, has_bias, is_unsigned, bits, monkeypatch):
    monkeypatch.setattr(int8, "input_bits", lambda: bits)
    layer, tensor = make_linear(37, width, is_unsigned, has_bias)
    rows = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(1))
    rows[0, 0] *= 1000
    rows[1, 1] = 1  # with weights of one sign, the largest sums there are
    rows = rows.abs() if is_unsigned else rows
    steps = 2**bits - 1 if is_unsigned else 2 ** (bits - 1) - 1
    wide = rows.double()
    size = wide.abs().amax(-1, keepdim=True)
    rounded = torch.round((rows / rows.abs().amax(-1, keepdim=True)).double() * steps) / steps
    weight = torch.from_numpy(tensor.values).double() * torch.from_numpy(tensor.scales)[:, None]
    expected = (rounded @ weight.T) * size
    if has_bias:
        expected += layer.bias
    error = (layer(rows) - expected).abs().amax(-1) / expected.abs().amax(-1)
    assert float(error.max()) < TOLERANCE


@pytest.mark.slow
def test_inputs_have_the_bits_that_fbgemms_instructions_can_add_up():
    """FBGEMM can be told to do without what newer processors have."""
    program = "from opt_torch import int8; print(int8.input_bits())"
    env = os.environ | {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert done.stdout == "7\n", done.stderr
    has_vnni = bool({"avx512_vnni", "amx_int8"} & set(cpu_flags()))
    assert int8.input_bits() == 8 or not has_vnni


def test_sums_do_not_overflow():
    values = np.full((8, 4096), 127, np.int8)
    tensor = quantize_array("w", np.ones((8, 4096), np.float32), "int8")
    np.testing.assert_array_equal(tensor.values, values)
    for is_unsigned in (False, True):
        layer = QuantizedLinear(QuantizedWeight(tensor, torch.float32), None)
        layer.is_unsigned = is_unsigned
        torch.testing.assert_close(layer(torch.ones(5, 4096)), torch.full((5, 8), 4096.0))


def test_a_row_s_result_depends_on_nothing_but_the_row():
    layer, _ = make_linear(50, 96)
    rows = torch.randn(40, 96) * torch.logspace(-6, 6, 40)[:, None]
    together = layer(rows)
    for i in range(40):
        assert torch.equal(layer(rows[i : i + 1])[0], together[i])


def test_rows_of_zeros_and_rows_that_are_not_finite():
    layer, _ = make_linear(5, 8)
    rows = torch.ones(4, 8)
    rows[0], rows[1, 3], rows[2, 3] = 0, float("nan"), float("inf")
    out = layer(rows)
    assert torch.equal(out[0], layer.bias)
    assert not torch.isfinite(out[1:3]).any()
    assert torch.isfinite(out[3]).all()
    assert layer(torch.ones(0, 8)).shape == (0, 5)


def test_packed_weights_take_the_place_of_the_plain_ones():
    layer, tensor = make_linear(21, 40)
    weight, rows = layer.weight, torch.randn(2, 40)
    out = layer(rows)
    assert weight.packed is not None
    assert weight.values is None
    np.testing.assert_array_equal(weight.dequantize(), tensor.dequantize())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight.packed is None
        assert torch.equal(other(rows), out)
    half = layer.to(torch.bfloat16)
    assert half.weight.packed is None
    assert half.weight.scales.dtype == torch.float32
    np.testing.assert_array_equal(half.weight.dequantize(), tensor.dequantize())
    assert half(rows.bfloat16()).dtype == torch.bfloat16


def test_queries_keys_and_values_are_one_product(folder):
    model = opt_torch.OPTForCausalLM.from_pretrained(folder("pre_ln"), quantize="int8")
    ids, given = torch.tensor([[2, 5, 9, 4]]), {"max_new_tokens": 5, "eos_token_id": None}
    attention: Any = model.get_decoder().layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    plain = [part.weight.dequantize() for part in parts]
    together = model(ids).logits
    order = parts[0].weight.packed.order
    assert [part.weight.packed.order is order for part in parts] == [True] * 3
    assert [part.weight.values for part in parts] == [None] * 3
    model.generate(ids, **given)
    assert parts[2].weight.packed.order is order, "packed once, for prompts and for steps"
    for part, weight in zip(parts, plain, strict=True):
        assert torch.equal(part.weight.dequantize(), weight)
        assert torch.equal(copy.deepcopy(part).weight.dequantize(), weight)

    seen = []  # a projection with a hook is called, and by itself
    hook = parts[1].register_forward_hook(lambda *call: seen.append(call))
    assert torch.equal(model(ids).logits, together)
    assert len(seen) == 1
    assert [part.weight.packed.count for part in parts] == [1] * 3
    hook.remove()
    assert torch.equal(model(ids).logits, together)
    assert [part.weight.packed.count for part in parts] == [3] * 3


def test_gradients_and_transforms_go_through_the_weight_itself():
    layer, tensor = make_linear(6, 9)
    row = torch.randn(1, 9, requires_grad=True)
    layer(row).sum().backward()
    torch.testing.assert_close(row.grad[0], torch.from_numpy(tensor.dequantize()).sum(0))
    row = row.detach()
    expected = row @ layer.weight.dequantize().T + layer.bias
    together = torch.vmap(layer)(torch.stack([row] * 2))
    torch.testing.assert_close(together, torch.stack([expected] * 2))


def test_inputs_that_are_never_negative_have_twice_the_steps(folder):
    for variant in ("pre_ln", "galactica"):
        config = CONFIGS[variant]
        model = opt_torch.OPTForCausalLM.from_pretrained(folder(variant), quantize="int8")
        layer: Any = model.get_decoder().layers[0]
        head: Any = model.lm_head
        assert layer.fc2.is_unsigned == (config.activation_function == "relu")
        assert not layer.fc1.is_unsigned
        assert not head.is_unsigned


def test_padding_batches_and_streams_change_no_id(folder):
    model = opt_torch.OPTForCausalLM.from_pretrained(folder("pre_ln"), quantize="int8")
    ids, lengths = make_prompts(model.config, 3, 7), [7, 4, 2]
    given = {"max_new_tokens": 16, "eos_token_id": None}
    together = model.generate(ids, make_mask("left", lengths), **given)
    for i, length in enumerate(lengths):
        alone = model.generate(ids[i : i + 1, 7 - length :], **given)
        assert torch.equal(alone[0, length:], together[i, 7:])
        guessed = model.generate(ids[i : i + 1, 7 - length :], prompt_lookup_num_tokens=3, **given)
        assert torch.equal(guessed, alone)
        streamed = torch.stack(list(model.stream(ids[i : i + 1, 7 - length :], **given)), 1)
        assert torch.equal(streamed[0], alone[0, length:])


def test_it_is_near_the_float_model():
    ids = torch.arange(3, 203).view(2, 100)
    full, model = (
        opt_torch.OPTForCausalLM.from_pretrained("mini", quantize=quantize)
        for quantize in (None, "int8")
    )
    with torch.no_grad():
        theirs, ours = full(ids).logits, model(ids).logits
    error = (ours - theirs).pow(2).mean().sqrt() / theirs.std()
    assert 0 < float(error) < MINI_ERROR


def test_smoothing_undoes_what_outliers_cost(tmp_path):
    """On `mini`, some inputs of its layers 64 times as large, and their weights as much smaller."""
    with_outliers(tmp_path / "outliers")
    folder = tmp_path / "smoothed"
    tokenizer = OPTTokenizer.from_pretrained("mini")
    text = tokenizer.encode("Now is the winter of our discontent made glorious summer. " * 40)
    smooth(tmp_path / "outliers", folder, calibration_rows(text, 4, 128))
    ids, errors = torch.tensor([text[:128]]), []
    for path in ("mini", tmp_path / "outliers", folder):
        models = [
            opt_torch.OPTForCausalLM.from_pretrained(path, dtype="float32", quantize=quantize)
            for quantize in (None, "int8")
        ]
        with torch.no_grad():
            exact, rounded = (model(ids).logits for model in models)
        errors.append(float((rounded - exact).norm() / exact.norm()))
    assert errors[1] > 5 * errors[0]
    assert errors[2] < 1.2 * errors[0]


def with_outliers(folder):
    """Writes such a copy of `mini`."""
    model = opt_torch.OPTForCausalLM.from_pretrained("mini", dtype="float32")
    readers = tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "fc1"))
    for name, value in model.state_dict().items():
        if ".layers." in name and "layer_norm" in name:
            value[3::90] *= 64
        elif name.endswith(readers):
            value[:, 3::90] /= 64
    model.save_pretrained(folder)
