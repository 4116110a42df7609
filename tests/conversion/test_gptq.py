"""Rounding by a text: what the paper says, and less of what a layer puts out is lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conversion.gptq as rounding
from conversion.calibration import perplexity, run_layers
from conversion.readers import open_any_checkpoint
from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.checkpoints.quantized.tensor import numbers_of, stored_scheme
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, ConfigError
from opt_core.params import param_specs
from opt_core.quantization import QuantizedTensor, quantize_array, scheme_of, unpack
from tests.support import oracle
from tests.support.command_line import Run
from tests.support.configs import CONFIGS
from tests.support.files.checkpoint_fixtures import write
from tests.support.files.format_fixtures import values

IDS = np.random.default_rng(5).integers(4, 90, (4, 24))
HELD = np.random.default_rng(6).integers(4, 90, (2, 24))
LOSS_ERROR = 1e-5  # float32 against float64, relative
GELU_ERROR = 1e-4  # the same, and the tanh form of gelu against the exact one


def save(folder: Path, config: OPTConfig) -> dict[str, Any]:
    weights = {name: a.astype(np.float32) for name, a in oracle.random_params(config).items()}
    write(folder, weights)
    config.save_pretrained(folder)
    return weights


def steps_of(numbers: QuantizedTensor) -> Any:
    if numbers.zeros is None:
        return numbers.values.astype(int)
    return unpack(numbers.values)[:, : numbers.width].astype(int)


def to_nearest(weight: Any, bits: int) -> Any:
    """The weight on the min-max grids of its groups of 64, or in "int8"."""
    if bits == 8:
        return quantize_array("w", weight, "int8").dequantize()
    parts = []
    for start in range(0, weight.shape[1], 64):
        group = weight[:, start : start + 64].astype(np.float64)
        low, high = group.min(1, initial=0), group.max(1, initial=0)
        scale = ((high - low) / (2**bits - 1))[:, None]
        zero = np.rint(-low[:, None] / scale)
        parts.append((np.clip(np.rint(group / scale) + zero, 0, 2**bits - 1) - zero) * scale)
    return np.concatenate(parts, 1)


def by_elimination(weight: Any, hessian: Any, numbers: QuantizedTensor, bits: int) -> Any:
    """The paper's equations 2 and 3, input by input, with the inverse Hessian itself in float64."""
    wide = hessian.astype(np.float64)
    inverse = np.linalg.inv(wide + 0.01 * wide.diagonal().mean() * np.eye(len(wide)))
    left = weight.astype(np.float64)
    width, steps = weight.shape[1], np.zeros(weight.shape, int)
    scales = numbers.scales.reshape(len(weight), -1).astype(np.float64)
    zeros = np.zeros_like(scales) if numbers.zeros is None else numbers.zeros.astype(float)
    low, high = (-127, 127) if numbers.zeros is None else (0, 2**bits - 1)
    for i in range(width):
        g = i // 64 if numbers.zeros is not None else 0
        step = np.clip(np.rint(left[:, i] / scales[:, g]) + zeros[:, g], low, high)
        error = left[:, i] - (step - zeros[:, g]) * scales[:, g]
        steps[:, i] = step
        left -= np.outer(error, inverse[i]) / inverse[i, i]
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return steps


@pytest.mark.parametrize(("bits", "share"), [(3, 0.995), (4, 0.995), (8, 0.97)])
def test_inputs_are_rounded_as_the_paper_says(bits: int, share: float):
    """All but those that float32 and float64 see on different sides of a half."""
    random = np.random.default_rng(3)
    weight = random.normal(size=(9, 150)).astype(np.float32)  # more than one block and two groups
    rows = (random.normal(size=(400, 20)) @ random.normal(size=(20, 150))).astype(np.float32)
    rows += random.normal(size=rows.shape).astype(np.float32)
    hessian = rows.T @ rows
    made = rounding._round("w", weight, hessian, rounding._factor(hessian), bits)
    expected = by_elimination(weight, hessian, made, bits)
    assert (steps_of(made) == expected).mean() >= share
    assert np.abs(steps_of(made) - expected).max() <= 1
    nearest = to_nearest(weight, bits)
    lost = [np.square(rows @ (w - weight).T).sum() for w in (made.dequantize(), nearest)]
    assert lost[0] < 0.5 * lost[1]


@pytest.mark.parametrize("bits", [3, 4])
def test_grids_are_those_of_a_few_that_lose_least(bits: int):
    last = 2**bits - 1
    random = np.random.default_rng(4)
    weight = random.standard_t(3, size=(5, 130)).astype(np.float32)
    importance = random.uniform(0.1, 3, 130).astype(np.float32)
    made = rounding._grids("w", weight, importance, bits)
    assert made.zeros is not None
    for o in range(5):
        for g, start in enumerate(range(0, 130, 64)):
            group = weight[o, start : start + 64].astype(np.float64)
            counts = importance[start : start + 64]
            low, high = min(group.min(), 0), max(group.max(), 0)
            losses = {}
            for share in [1, *rounding._SHARES]:
                scale = (high - low) * share / last
                zero = np.clip(np.rint(-low * share / scale), 0, last)
                steps = np.clip(np.rint(group / scale) + zero, 0, last)
                losses[share] = (np.square((steps - zero) * scale - group) * counts).sum()
            chosen = float(made.scales[o, g]) * last / (high - low)
            near = min(losses, key=lambda share: abs(share - chosen))
            assert losses[near] <= 1.0001 * min(losses.values())
    kept = quantize_array("w", weight, "int8")
    np.testing.assert_array_equal(rounding._grids("w", weight, importance, 8).scales, kept.scales)


@pytest.mark.parametrize("variant", CONFIGS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_rounded_model_loses_less_than_one_rounded_to_nearest(
    variant: str, bits: int, tmp_path: Path
):
    config, scheme, calls = CONFIGS[variant], rounding.SCHEMES[bits], list[tuple[int, int]]()
    weights = save(tmp_path / "a", config)
    done = rounding.quantize(
        tmp_path / "a", tmp_path / "b", IDS, bits, HELD, progress=lambda *c: calls.append(c)
    )
    assert calls == [(1, 2), (2, 2)]
    plan = plan_load(open_checkpoint(tmp_path / "b"), config, "causal_lm")
    assert stored_scheme(plan.entries) == scheme
    found = {spec.name: array for spec, array in plan.stream()}
    nearest = dict(weights)
    for spec in param_specs(config):
        if kept := scheme_of(spec, scheme):
            nearest[spec.name] = quantize_array(spec.name, weights[spec.name], kept).dequantize()
        if not kept or ".layers." not in spec.name:
            np.testing.assert_array_equal(found[spec.name], nearest[spec.name])
    exact, ours, plain = (
        oracle.forward(p, config, IDS).hidden_states[-1] for p in (weights, found, nearest)
    )
    assert np.square(ours - exact).mean() < 0.8 * np.square(plain - exact).mean()
    before, after = done.perplexity or (0, 0)
    expected = [loss(weights, config), loss(found, config)]
    close = GELU_ERROR if config.activation_function == "gelu" else LOSS_ERROR
    np.testing.assert_allclose(np.log([before, after]), expected, rtol=close)


def loss(params: dict[str, Any], config: OPTConfig) -> float:
    logits = oracle.forward(params, config, HELD).logits[:, :-1]
    logits = logits - logits.max(-1, keepdims=True)
    log = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return float(-np.take_along_axis(log, HELD[:, 1:, None], -1).mean())


def test_each_layer_is_rounded_for_what_the_rounded_ones_give(tmp_path: Path):
    config = CONFIGS["pre_ln"]
    save(tmp_path / "a", config)
    rounding.quantize(tmp_path / "a", tmp_path / "b", IDS)
    found = open_any_checkpoint(tmp_path / "b")
    tensors, seen = dict(found.checkpoint.tensors), dict[str, Any]()
    list(run_layers(config, tensors, IDS, lambda name, rows: seen.update({name: rows})))
    name = "model.decoder.layers.1.fc1"
    rows = seen[name].reshape(-1, 32)
    hessian = rows.T @ rows
    weight = values(tmp_path / "a")[f"{name}.weight"].astype(np.float32)
    again = rounding._round("w", weight, hessian, rounding._factor(hessian), 4)
    np.testing.assert_array_equal(again.dequantize(), tensors[f"{name}.weight"].read())


@pytest.mark.parametrize("bits", rounding.SCHEMES)
def test_gptqs_layout_holds_rounded_layers_and_the_rest_as_it_was(bits: int, tmp_path: Path):
    config = CONFIGS["pre_ln"].replace(ffn_dim=64)
    weights = save(tmp_path / "a", config)
    rounding.quantize(tmp_path / "a", tmp_path / "b", IDS, bits, to="gptq")
    settings = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (settings["quant_method"], settings["bits"]) == ("gptq", bits)
    found = open_any_checkpoint(tmp_path / "b")
    tensors, seen = dict(found.checkpoint.tensors), dict[str, Any]()
    list(run_layers(config, tensors, IDS, lambda name, rows: seen.update({name: rows})))
    for spec, tensor in found.plan().entries:
        if ".layers." not in spec.name or len(spec.shape) == 1:
            np.testing.assert_array_equal(tensor.read(), weights[spec.name])
            continue
        kept = numbers_of(spec.name, tensor, rounding.SCHEMES[bits])
        np.testing.assert_array_equal(kept.dequantize(), tensor.read())
        if spec.name.endswith("fc2.weight"):
            rows = seen[spec.name.removesuffix(".weight")].reshape(-1, 64)
            hessian = rows.T @ rows
            factor = rounding._factor(hessian)
            again = rounding._round("w", weights[spec.name], hessian, factor, bits)
            np.testing.assert_array_equal(steps_of(kept), steps_of(again))


def test_what_cannot_be_rounded_is_refused(tmp_path: Path):
    config = CONFIGS["pre_ln"]
    weights = save(tmp_path / "a", config)
    new = tmp_path / "b"
    with pytest.raises(ConfigError, match="bits: expected 3, 4 or 8, received 2"):
        rounding.quantize(tmp_path / "a", new, IDS, 2)
    with pytest.raises(ConfigError, match="bits: expected 4 or 8 with to='safetensors'"):
        rounding.quantize(tmp_path / "a", new, IDS, 3)
    with pytest.raises(ConfigError, match="to: expected safetensors or gptq, received 'awq'"):
        rounding.quantize(tmp_path / "a", new, IDS, to="awq")
    with pytest.raises(ConfigError, match=r"text: expected ids in 0\.\.98"):
        rounding.quantize(tmp_path / "a", new, IDS, held_BT=HELD + 90)
    weights["model.decoder.layers.1.fc1.bias"][3] = np.inf
    write(tmp_path / "a", weights)
    with pytest.raises(CheckpointError, match=r"layers.1.fc2: inputs are NaN, infinite, or too"):
        rounding.quantize(tmp_path / "a", new, IDS)
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_few_rows_and_unused_inputs_do(tmp_path: Path):
    hessian = np.zeros((6, 6), np.float32)
    for rows in (np.zeros((1, 6)), np.ones((3, 6)), np.eye(6)[:2]):
        hessian = (rows.T @ rows).astype(np.float32)
        factor = rounding._factor(hessian)
        assert np.isfinite(factor).all()
        assert (factor.diagonal() > 0).all()
    config = CONFIGS["pre_ln"]
    save(tmp_path / "a", config)
    plan = open_any_checkpoint(tmp_path / "a").plan()
    tensors = {spec.name: tensor for spec, tensor in plan.entries}
    assert perplexity(config, tensors, HELD) > 1


def test_the_command_says_what_it_cost(tmp_path: Path, opt_lm: Run, texts: Any):
    text = tmp_path / "text.txt"
    text.write_text("Speak, speak. You are all resolved rather to die than to famish? " * 40)
    given = [texts[0], tmp_path / "b", "--text", text, "--rows", 3, "--length", 16]
    before, after = json.loads(opt_lm("quantize", *given, "--json").out)["perplexity"]
    assert 0 < abs(after - before) < 0.2 * before
    again = opt_lm("quantize", *given)
    assert again.code == 2
    assert "already exists" in again.err
