"""Smoothing: the same model to the last bit, with smaller outliers, for every architecture."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion import smooth
from conversion.calibration import activation_scales
from conversion.readers import open_any_checkpoint
from conversion.smoothquant import calibration_rows
from opt_cli.main import main
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, ConfigError, DataError
from tests.support import oracle
from tests.support.configs import CONFIGS
from tests.support.files.checkpoint_fixtures import Weights, write
from tests.support.files.format_fixtures import values

IDS = np.random.default_rng(5).integers(4, 90, (3, 12))
SCALE_ERROR = 1e-5  # float32 against float64, relative

VARIANTS = {**CONFIGS, "gelu": CONFIGS["pre_ln"].replace(activation_function="gelu")}
PLACES = {"pre_ln": 4, "post_ln": 2, "galactica": 1, "gelu": 3}


def save(folder: Path, config: OPTConfig, weights: Weights) -> None:
    write(folder, weights)
    config.save_pretrained(folder)


def with_outliers(folder: Path, config: OPTConfig, dtype: str = "float32") -> Weights:
    weights = {n: w.astype(dtype) for n, w in oracle.random_params(config).items()}
    for name in weights:
        if name.endswith("layer_norm.weight"):
            weights[name][[1, 5]] *= 64
    save(folder, config, weights)
    return weights


def logits(folder: Path, config: OPTConfig) -> Any:
    return oracle.forward(values(folder), config, IDS).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_stays_the_same_to_the_last_bit(variant: str, tmp_path: Path):
    config = VARIANTS[variant]
    with_outliers(tmp_path / "a", config)
    done = smooth(tmp_path / "a", tmp_path / "b", IDS)
    assert np.array_equal(logits(tmp_path / "a", config), logits(tmp_path / "b", config))
    assert done.inputs == (4 * config.num_hidden_layers, PLACES[variant] * config.num_hidden_layers)
    before, after = values(tmp_path / "a"), values(tmp_path / "b")
    assert any(not np.array_equal(before[name], after[name]) for name in before)


def test_outliers_become_smaller(tmp_path: Path):
    config = CONFIGS["pre_ln"]
    with_outliers(tmp_path / "a", config)
    done = smooth(tmp_path / "a", tmp_path / "b", IDS)
    before, after = done.outliers
    assert before > 50
    assert after < before / 4
    again = smooth(tmp_path / "b", tmp_path / "c", IDS)
    assert again.outliers[0] == pytest.approx(after, rel=1e-4)


def test_progress_of_measuring_and_writing(tmp_path: Path):
    config = CONFIGS["pre_ln"]
    weights = with_outliers(tmp_path / "a", config)
    layers: list[tuple[int, int]] = []
    written: list[tuple[int, int]] = []

    def writing(*amounts: int) -> None:
        assert len(layers) == config.num_hidden_layers
        written.append((amounts[0], amounts[1]))

    smooth(
        tmp_path / "a",
        tmp_path / "b",
        IDS,
        progress=lambda *amounts: layers.append(amounts),
        writing=writing,
    )
    count, total = config.num_hidden_layers, sum(weight.nbytes for weight in weights.values())
    assert layers == [(layer + 1, count) for layer in range(count)]
    assert written == sorted(written)
    assert written[-1] == (total, total)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_are_what_the_model_computes(variant: str, tmp_path: Path):
    config = VARIANTS[variant]
    save(tmp_path / "a", config, oracle.random_params(config))
    source = open_any_checkpoint(tmp_path / "a").checkpoint
    scales = activation_scales(config, source.tensors, IDS)
    weights = {n: np.asarray(t.read(), np.float64) for n, t in source.tensors.items()}
    if config.activation_function == "gelu":  # the tanh form is near enough here
        config = config.replace(activation_function="gelu_new")
    states = oracle.forward(weights, config, IDS).hidden_states
    for layer in range(config.num_hidden_layers):
        name = f"model.decoder.layers.{layer}"
        x = states[layer]
        if config.do_layer_norm_before:
            x = oracle._layer_norm(x, weights, f"{name}.self_attn_layer_norm")
        expected = np.abs(x).max((0, 1))
        found = scales[f"{name}.self_attn.qkv"]
        np.testing.assert_allclose(found, expected, rtol=SCALE_ERROR, atol=SCALE_ERROR)


def test_float16_that_would_overflow_is_refused(tmp_path: Path):
    config = CONFIGS["pre_ln"]
    weights = with_outliers(tmp_path / "a", config, "float16")
    name = "model.decoder.layers.0.fc2.weight"
    weights[name] = np.full_like(weights[name], 6e4)
    save(tmp_path / "a", config, weights)
    with pytest.raises(CheckpointError, match="scaled, it is beyond float16"):
        smooth(tmp_path / "a", tmp_path / "b", IDS, alpha=1.0)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": 1.5}, r"alpha: expected 0..1, received 1.5"),
        ({"ids_BT": IDS.astype(float)}, "text: expected rows of ids, received float64"),
        ({"ids_BT": IDS + 1000}, "text: expected ids in 0.."),
        ({"ids_BT": np.full((1, 10_000), 4)}, "text: expected rows of at most"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path):
    with_outliers(tmp_path / "a", CONFIGS["pre_ln"])
    changes = {"ids_BT": IDS} | changes
    with pytest.raises(ConfigError, match=message):
        smooth(tmp_path / "a", tmp_path / "b", **changes)
    assert not (tmp_path / "b").exists()


def test_nan_is_refused(tmp_path: Path):
    config = CONFIGS["pre_ln"]
    weights = oracle.random_params(config)
    weights["model.decoder.layers.1.fc1.bias"][0] = np.nan
    save(tmp_path / "a", config, weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc2: inputs are NaN or infinite"):
        smooth(tmp_path / "a", tmp_path / "b", IDS)


def test_rows_are_taken_evenly():
    assert calibration_rows(range(10), 2, 3).tolist() == [[0, 1, 2], [7, 8, 9]]
    assert calibration_rows(range(7), 5, 3).tolist() == [[0, 1, 2], [4, 5, 6]]
    with pytest.raises(DataError, match="the text has 2 tokens, less than one row of 3"):
        calibration_rows([1, 2], 1, 3)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = tmp_path / "text.txt"
    text.write_text("Now is the winter of our discontent. " * 40)
    out = str(tmp_path / "smoothed")
    for more, code in ((("--json",), 0), ((), 2)):
        with pytest.raises(SystemExit) as end:
            main(["smooth", "mini", out, "--text", str(text), "--length", "64", *more])
        assert end.value.code == code
        said = capsys.readouterr()
        if code:
            assert said.err.strip() == f"error: {out}: already exists; name a new folder"
        else:
            assert json.loads(said.out)["inputs"] == [16, 16]
