"""Checkpoints that others wrote are read, and others read ours, with equal logits.

The recorded checkpoints were made by `tests/support/files/record_checkpoints.py`. The live tests
run where an environment variable names an interpreter that has the libraries:
OPT_TRANSFORMERS4_PYTHON (transformers 4.57 with TensorFlow, Flax and torch) and
OPT_KERAS_HUB_PYTHON (transformers 5, keras-hub, CTranslate2).
"""

import json
import os
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conversion
from conversion.readers import open_any_checkpoint
from opt_core.config import OPTConfig
from opt_core.text.tokenizer import OPTTokenizer
from tests.support.files.checkpoint_fixtures import BARE, PROJECTED, TINY, UNTIED, write
from tests.support.oracle import forward, random_params
from tests.support.small_tokenizer import write_opt_folder

HERE = Path(__file__).parent
SCRIPTS = HERE.parent / "support"
RECORDED = sorted(path.name for path in (HERE / "recorded").iterdir())
IDS = np.array([[2, 5, 9, 20, 3, 7]])
TOLERANCE = 2e-5
"""|logits - float64 oracle| of single-precision libraries."""
COMPUTED_IN_HALF = 2e-2
"""The same, where the library computes in float16."""


def logits_of(folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits that the float64 oracle computes from a folder of any format."""
    found = open_any_checkpoint(folder)
    tensors = {name: t.read().astype(np.float64) for name, t in found.checkpoint.tensors.items()}
    return forward(tensors, found.read_config(), ids).logits


def assert_is_read(theirs: Path, new: Path) -> None:
    expected = np.load(theirs / "expected.npz")
    done = conversion.convert(theirs, new)
    assert len(done.notes) == ("keras_hub" in theirs.name), done.notes  # of rows that it drops
    for folder in (theirs, new):
        logits = logits_of(folder, expected["ids"])
        np.testing.assert_allclose(logits, expected["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_checkpoints_have_the_logits_their_library_gave(name: str, tmp_path: Path):
    assert_is_read(HERE / "recorded" / name, tmp_path / "new")


GALACTICA = BARE.replace(activation_function="gelu")
# Library, format, model, stored type, shard size.
WRITTEN = {
    "tf": ("transformers4", "tf", "tf-h5", TINY, None, "5GB"),
    "tf sharded like 350m": ("transformers4", "tf", "tf-h5", PROJECTED, None, "1KB"),
    "tf float16": ("transformers4", "tf", "tf-h5", TINY, "float16", "5GB"),
    "flax": ("transformers4", "flax", "flax-msgpack", TINY, None, "5GB"),
    "flax sharded like 350m": ("transformers4", "flax", "flax-msgpack", PROJECTED, None, "1KB"),
    "flax bfloat16": ("transformers4", "flax", "flax-msgpack", TINY, "bfloat16", "5GB"),
    "flax untied": ("transformers4", "flax", "flax-msgpack", UNTIED, None, "5GB"),
    "torch 4": ("transformers4", "torch", "torch-bin", PROJECTED, "float16", "1KB"),
    "torch 4 safetensors": ("transformers4", "torch", "safetensors", TINY, None, "1KB"),
    "torch 5": ("keras_hub", "torch", "torch-bin", TINY, None, "5GB"),
    "torch 5 sharded": ("keras_hub", "torch", "torch-bin", GALACTICA, None, "1KB"),
    "torch 5 safetensors": ("keras_hub", "torch", "safetensors", UNTIED, "bfloat16", "1KB"),
    "KerasHub": ("keras_hub", "keras_hub", "keras-hub", TINY, None, "5GB"),
    "KerasHub bfloat16": ("keras_hub", "keras_hub", "keras-hub", TINY, "bfloat16", "5GB"),
    "KerasHub's tokenizer": ("keras_hub", "keras_hub_text", "keras-hub", TINY, None, "5GB"),
    "CTranslate2": ("keras_hub", "ctranslate2", "safetensors", TINY, None, "5GB"),
    "CTranslate2 like 350m": ("keras_hub", "ctranslate2", "torch-bin", PROJECTED, None, "5GB"),
}
PYTHONS = {
    "transformers4": "OPT_TRANSFORMERS4_PYTHON",
    "keras_hub": "OPT_KERAS_HUB_PYTHON",
}


def ask(library: str, script: str, *arguments: Path) -> None:
    """Runs one of our scripts with an interpreter that has the library."""
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    done = subprocess.run(
        [os.environ[PYTHONS[library]], str(SCRIPTS / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **quiet},
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("library", PYTHONS)
def test_checkpoints_they_write_today_are_read(library: str, tmp_path: Path):
    if PYTHONS[library] not in os.environ:
        pytest.skip(f"{PYTHONS[library]} names no interpreter")
    ask(library, "record_checkpoints.py", tmp_path / "theirs")
    names = {path.name for path in (tmp_path / "theirs").iterdir()}
    assert names == {name for name in RECORDED if ("keras_hub" in name) == (library == "keras_hub")}
    for name in names:
        assert_is_read(tmp_path / "theirs" / name, tmp_path / name)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs one interpreter on all we write for it; gives the folder of its answers."""

    @cache
    def run(library: str) -> Path:
        root = tmp_path_factory.mktemp(library)
        jobs: list[dict[str, Any]] = []
        for i, (whose, reader, to, config, dtype, size) in enumerate(WRITTEN.values()):
            if whose == library:
                write_model(root / f"source{i}", config)
                conversion.convert(root / f"source{i}", root / f"new{i}", to, dtype, size)
                paths = {"folder": str(root / f"new{i}"), "out": str(root / f"{i}.npy")}
                jobs.append({"reader": reader, "ids": IDS.tolist(), **paths})
        (root / "jobs.json").write_text(json.dumps(jobs))
        ask(library, "interop.py", root / "jobs.json")
        return root

    return run


def write_model(folder: Path, config: OPTConfig) -> None:
    """A model with a tokenizer."""
    write_opt_folder(folder)
    vocabulary = len(json.loads((folder / "vocab.json").read_text()))
    # CTranslate2 takes rows without a token up to the next multiple of 8, as the real models have.
    config = config.replace(vocab_size=vocabulary + -vocabulary % 8)
    write(folder, random_params(config))
    config.save_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", WRITTEN)
def test_others_compute_the_same_from_what_we_wrote(case: str, answers: Callable[[str], Path]):
    library = WRITTEN[case][0]
    if PYTHONS[library] not in os.environ:
        pytest.skip(f"{PYTHONS[library]} names no interpreter")
    root, i = answers(library), list(WRITTEN).index(case)
    received = np.load(root / f"{i}.npy")
    if case == "KerasHub's tokenizer":
        ids = OPTTokenizer.from_pretrained(root / f"source{i}")(["the dog sleeps"]).input_ids
        assert received.tolist() == ids[0, 1:].tolist()
        return
    expected = logits_of(root / f"new{i}", IDS)
    assert np.abs(expected).max() > 1
    received = received.reshape(*IDS.shape, -1)[..., : expected.shape[-1]]
    tolerance = COMPUTED_IN_HALF if case == "tf float16" else TOLERANCE
    np.testing.assert_allclose(received, expected, rtol=0, atol=tolerance)
