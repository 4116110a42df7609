"""PyTorch's kernel for 4-bit weights: how far it is off, and that the numbers stay the scheme's."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import opt_torch  # noqa: E402
from conversion.smoothquant import calibration_rows  # noqa: E402
from opt_core import OPTTokenizer  # noqa: E402
from opt_core.quantization import GROUP, quantize_array  # noqa: E402
from opt_torch import _private, int4  # noqa: E402
from opt_torch.linear import product_dtype  # noqa: E402
from opt_torch.quantization import QuantizedLinear, QuantizedWeight  # noqa: E402

if not _private.has_int4_linear() or int4.block_rows() is None:
    pytest.skip("no kernel for 4-bit weights on this processor", allow_module_level=True)

TOLERANCE = 1e-6
"""Of many rows against the exact weight in float64, relative to the largest result."""
KERNEL_TOLERANCE = 2**-8
"""Of few rows against what the kernel rounds, in float64: the rounding of a result to bfloat16."""
MINI_ERROR = 0.006
"""Of `mini`'s logits by the kernel against the exact weights: root mean square, relative to their
spread; 0.0045 when measured. The weights' own rounding to 4 bits makes 0.037."""


def make_linear(out, width, has_bias=True, seed=0):
    rng = np.random.default_rng(seed)
    array = (rng.standard_normal((out, width)) + rng.standard_normal((out, 1))).astype(np.float32)
    tensor = quantize_array("w", array, "int4")
    bias = torch.from_numpy(rng.standard_normal(out).astype(np.float32)) if has_bias else None
    return QuantizedLinear(QuantizedWeight(tensor, torch.float32), bias).eval(), tensor


def rounded(values):
    return torch.as_tensor(values).bfloat16().double()


def kernels_weight(tensor):
    """The weight as the kernel has it: scale and shift of each group in bfloat16."""
    low, high = tensor.values & 15, tensor.values >> 4
    steps = np.stack((low, high), -1).reshape(*tensor.scales.shape, GROUP)
    scales = rounded(tensor.scales)
    shifts = rounded((8.0 - torch.from_numpy(tensor.zeros)) * scales)
    grouped = (torch.from_numpy(steps).double() - 8) * scales[..., None] + shifts[..., None]
    return grouped.flatten(-2)[:, : tensor.width]


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (37, 70), (96, 256)])
def test_few_rows_are_rounded_and_many_are_not(out, width, has_bias):
    layer, tensor = make_linear(out, width, has_bias)
    shift = 0 if layer.bias is None else layer.bias.double()
    exact = torch.from_numpy(tensor.dequantize()).double()
    for rows in (1, 3, int4.FEW_ROWS, int4.FEW_ROWS + 1):
        input = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows))
        is_few = rows <= int4.FEW_ROWS
        weight, wide = (kernels_weight(tensor), rounded(input)) if is_few else (exact, input)
        expected = wide.double() @ weight.T + shift
        error = (layer(input) - expected).abs().max() / expected.abs().max()
        assert error < (KERNEL_TOLERANCE if is_few else TOLERANCE)
    assert layer(torch.ones(0, width)).shape == (0, out)
    assert layer(torch.ones(2, 0, width)).shape == (2, 0, out)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_type_of_the_rows(dtype):
    layer, tensor = make_linear(37, 70)
    assert layer.bias is not None
    # Processors with products in bfloat16 get the widened weight in it too.
    many = torch.from_numpy(tensor.dequantize()).to(product_dtype(dtype)).double()
    for rows, weight in ((1, kernels_weight(tensor)), (int4.FEW_ROWS + 1, many)):
        input = torch.randn(rows, 70, generator=torch.Generator().manual_seed(rows)).to(dtype)
        found = layer(input)
        assert found.dtype == dtype
        wide = rounded(input) if rows == 1 else input.double()
        expected = wide @ weight.T + layer.bias.double()
        assert (found - expected).abs().max() < KERNEL_TOLERANCE * expected.abs().max()


def test_packed_weights_take_the_place_of_the_plain_ones():
    layer, tensor = make_linear(70, 100)
    weight, rows = layer.weight, torch.randn(2, 100)
    out = layer(rows)
    assert weight.packed is not None
    assert weight.values is None
    np.testing.assert_array_equal(weight.dequantize(), tensor.dequantize())
    np.testing.assert_array_equal(weight._values(), tensor.values)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.weight.packed is None
        assert torch.equal(other(rows), out)
    half = layer.to(torch.bfloat16)
    assert half.weight.packed is None
    np.testing.assert_array_equal(half.weight.dequantize(), tensor.dequantize())


@pytest.mark.parametrize("block", [32, 64])
def test_what_is_packed_can_be_had_back(block):
    values = torch.randint(0, 256, (3 * block, 32), dtype=torch.uint8)
    packed = int4.pack(values, block)
    assert packed.shape == (3, 64, block // 2)
    assert torch.equal(int4.unpack(packed), values)


def test_an_unknown_order_of_the_kernel_is_not_used(monkeypatch):
    monkeypatch.setattr(_private, "int4_pack", lambda steps, tiles: steps.to(torch.uint8))
    assert int4.block_rows.__wrapped__() is None


def test_queries_keys_and_values_are_one_product(folder):
    model = opt_torch.OPTForCausalLM.from_pretrained(folder("pre_ln"), quantize="int4")
    attention: Any = model.get_decoder().layers[0].self_attn
    parts = [attention.q_proj, attention.k_proj, attention.v_proj]
    plain = [part.weight.dequantize() for part in parts]
    model(torch.tensor([[2, 5, 9, 4]]))
    order = parts[0].weight.packed.order
    assert [part.weight.packed.order is order for part in parts] == [True] * 3
    for part, weight in zip(parts, plain, strict=True):
        assert torch.equal(part.weight.dequantize(), weight)


def test_mini_is_nearly_what_the_exact_weights_make_it(monkeypatch):
    tokenizer = OPTTokenizer.from_pretrained("mini")
    ids = torch.from_numpy(calibration_rows(tokenizer.encode("To be, or not to be: " * 20), 4, 8))
    kernel = opt_torch.OPTForCausalLM.from_pretrained("mini", quantize="int4")(ids).logits
    monkeypatch.setattr(_private, "int4_linear", None)
    exact = opt_torch.OPTForCausalLM.from_pretrained("mini", quantize="int4")(ids).logits
    assert 0 < float((kernel - exact).std() / exact.std()) < MINI_ERROR
