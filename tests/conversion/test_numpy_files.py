"""Folders with one NumPy file for each tensor, as FlexGen and alpa keep OPT's weights."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conversion
from conversion.readers import open_any_checkpoint
from opt_core.errors import CheckpointError
from tests.support.files.checkpoint_fixtures import PROJECTED, TINY, UNTIED, random_weights

MODELS = {"pre-LN": TINY, "like 350m": PROJECTED, "untied": UNTIED}
FC1 = "decoder.layers.0.fc1.weight"


def write(folder: Path, weights: dict[str, Any], suffix: str = "") -> None:
    """As FlexGen's download does: "model." goes, the last norm is metaseq's, the head a copy."""
    folder.mkdir()
    for name, array in weights.items():
        name = name.removeprefix("model.").replace("decoder.final_layer_norm", "decoder.layer_norm")
        with (folder / f"{name}{suffix}").open("wb") as file:
            np.save(file, array)
    if "lm_head.weight" not in weights:
        shutil.copy(folder / f"decoder.embed_tokens.weight{suffix}", folder / "lm_head.weight")


@pytest.mark.parametrize("suffix", ["", ".npy"])
@pytest.mark.parametrize("name", MODELS)
def test_arrays_are_read_and_converted(name: str, suffix: str, tmp_path: Path):
    config = MODELS[name]
    weights = random_weights(config, dtype="float16")
    order = np.asfortranarray if suffix else np.ascontiguousarray
    write(tmp_path / "a", {key: order(array) for key, array in weights.items()}, suffix)
    config.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("not an array")
    assert conversion.describe(tmp_path / "a").format == "numpy"
    conversion.convert(tmp_path / "a", tmp_path / "b")
    for folder in (tmp_path / "a", tmp_path / "b"):
        found = open_any_checkpoint(folder)
        plan = found.plan()
        assert found.read_config().num_attention_heads == config.num_attention_heads
        assert {spec.name for spec, _ in plan.entries} == weights.keys()
        for spec, tensor in plan.entries:
            np.testing.assert_array_equal(tensor.read(), weights[spec.name], err_msg=spec.name)


def test_without_a_config_shapes_say_what_they_can(tmp_path: Path):
    write(tmp_path / "a", random_weights(TINY))
    with pytest.raises(CheckpointError, match="nothing says how many heads; put the model's"):
        open_any_checkpoint(tmp_path / "a").read_config()


def _save(array: Any) -> Callable[[Path], None]:
    def spoil(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=True)

    return spoil


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def _lie(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"(12, 8)", b"(99999999, 8)"[:7].ljust(7), 1))


SPOILT = {
    "pickles": (_save(np.array([print], object)), "an array of |O"),
    "integers": (_save(np.ones((12, 8), np.int32)), "an array of <i4"),
    "another byte order": (_save(np.ones((12, 8), ">f4")), "an array of >f4"),
    "cut": (_cut, "truncated"),
    "a header that is none": (_lie, "no array as NumPy saves it"),
    "another format": (lambda path: path.write_bytes(b"\x93PK\x03" * 30), "no array as NumPy"),
    "a text": (lambda path: path.write_text("Not Found"), "a text that begins"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_files_are_named(kind: str, tmp_path: Path):
    spoil, message = SPOILT[kind]
    write(tmp_path / "a", random_weights(TINY))
    spoil(tmp_path / "a" / FC1)
    with pytest.raises(CheckpointError, match=message.replace("|", r"\|")) as caught:
        open_any_checkpoint(tmp_path / "a")
    assert str(tmp_path / "a" / FC1) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_tensor_under_two_names_is_refused(tmp_path: Path):
    write(tmp_path / "a", random_weights(TINY))
    shutil.copy(tmp_path / "a" / FC1, tmp_path / "a" / f"{FC1}.npy")
    with pytest.raises(CheckpointError, match="is there twice"):
        open_any_checkpoint(tmp_path / "a")
