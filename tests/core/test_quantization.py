"""Quantised weights: the grids, rounding to the nearest point, edges, and which tensors."""

import numpy as np
import pytest

from opt_core.errors import CheckpointError, ConfigError
from opt_core.params import param_specs
from opt_core.quantization import GROUP, SCHEMES, check_scheme, quantize_array, scheme_of
from tests.support.configs import CONFIGS


def random(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32)


def test_int8_is_the_nearest_point_of_a_symmetric_grid():
    weight = random(7, 50)
    made = quantize_array("w", weight, "int8")
    scales = np.abs(weight).max(1) / np.float32(127)
    np.testing.assert_array_equal(made.scales, scales)
    assert np.abs(made.values.astype(int)).max(1).tolist() == [127] * 7
    grid = np.arange(-127, 128) * scales.astype(np.float64)[:, None]
    nearest = np.abs(weight[:, :, None] - grid[:, None, :]).argmin(-1) - 127
    np.testing.assert_array_equal(made.values, nearest)


@pytest.mark.parametrize("width", [64, 100, 128])
def test_int4_is_the_nearest_point_of_the_min_max_grid_of_each_group(width: int):
    weight = random(5, width)
    made = quantize_array("w", weight, "int4").dequantize()
    for row in range(5):
        for start in range(0, width, GROUP):
            group = weight[row, start : start + GROUP].astype(np.float64)
            low, high = min(group.min(), 0), max(group.max(), 0)
            scale = (high - low) / 15
            grid = (np.arange(16) - np.rint(-low / scale)) * scale
            nearest = grid[np.abs(group[:, None] - grid).argmin(-1)]
            np.testing.assert_allclose(made[row, start : start + GROUP], nearest, rtol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("size", [0, 1e-44, 1e-38, 3e38])
def test_zeros_and_extreme_values_stay_finite_and_near(scheme: str, size: float):
    weight = np.array([[size, -size] * 40, [0] * 80], np.float32)
    made = quantize_array("w", weight, scheme).dequantize()
    assert np.isfinite(made).all()
    assert np.abs(made[0].astype(np.float64) - weight[0]).max() <= max(size * 0.08, 1e-37)
    assert not made[1].any()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(scheme: str, bad: float):
    weight = random(3, 64)
    weight[2, 5] = bad
    with pytest.raises(CheckpointError, match=r"fc1: values that are not finite"):
        quantize_array("fc1", weight, scheme)


def test_sizes():
    assert quantize_array("w", random(8, 128), "int8").nbytes == 8 * 128 + 8 * 4
    assert quantize_array("w", random(8, 128), "int4").nbytes == 8 * 64 + 8 * 2 * 5


def test_what_is_quantised():
    specs = param_specs(CONFIGS["post_ln"], "sequence_classification")
    found = {spec.name: scheme_of(spec, "int4") for spec in specs}
    layer = "model.decoder.layers.0"
    assert found[f"{layer}.fc1.weight"] == found[f"{layer}.self_attn.q_proj.weight"] == "int4"
    for name in ("embed_tokens", "project_in", "project_out"):
        assert found[f"model.decoder.{name}.weight"] == "int8"
    for name in (f"{layer}.fc1.bias", f"{layer}.final_layer_norm.weight", "score.weight"):
        assert found[name] is None
    assert found["model.decoder.embed_positions.weight"] is None
    assert {scheme_of(spec, None) for spec in specs} == {None}


@pytest.mark.parametrize("bad", ["int3", "INT8", 8, True, ""])
def test_bad_schemes(bad: object):
    with pytest.raises(ConfigError, match="quantize: expected"):
        check_scheme(bad)
