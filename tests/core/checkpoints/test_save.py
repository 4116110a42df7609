"""Saving: what is written, what is replaced, and what survives a failure."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from opt_core.checkpoints.load import save_checkpoint
from opt_core.checkpoints.save import parse_size
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.params import param_specs
from tests.support.files.checkpoint_fixtures import (
    BARE,
    EMBEDDING,
    PROJECTED,
    TINY,
    UNTIED,
    Weights,
    assert_same,
    loaded,
    plan,
    random_weights,
)


def save(folder: Path, weights: Weights, config: OPTConfig = TINY, **settings: Any) -> None:
    """Saves a causal language model; settings are those of `save_checkpoint`."""
    settings = {"dtype": "float32", "specs": param_specs(config)} | settings
    fetch = {name: (lambda array=array: array) for name, array in weights.items()}
    save_checkpoint(folder, config, fetch, **settings)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", ["5GB", 500, "0.4kB"])
@pytest.mark.parametrize("config", [TINY, PROJECTED, BARE, UNTIED], ids=str)
def test_what_is_saved_loads_again(tmp_path, config, size):
    weights = random_weights(config)
    folder = tmp_path / "new" / "model"
    save(folder, weights, config, max_shard_size=size)
    assert_same(loaded(plan(folder, config)), weights)
    read = OPTConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert read == config.replace(dtype="float32")
    assert names_in(folder.parent) == ["model"]
    assert folder.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_the_config_names_the_class_and_the_type(tmp_path):
    weights = random_weights(TINY, "sequence_classification")
    save(
        tmp_path / "model",
        weights,
        specs=param_specs(TINY, "sequence_classification"),
        dtype="bfloat16",
        architecture="OPTForSequenceClassification",
    )
    values = json.loads((tmp_path / "model" / "config.json").read_text())
    assert values["architectures"] == ["OPTForSequenceClassification"]
    assert values["torch_dtype"] == "bfloat16"
    found = loaded(plan(tmp_path / "model", TINY, "sequence_classification"))
    assert_same(found, {name: a.astype(ml_dtypes.bfloat16) for name, a in weights.items()})


def test_shards_are_no_larger_than_asked_and_the_index_describes_them(tmp_path):
    weights = random_weights()
    assert weights[EMBEDDING].nbytes > 600  # the first tensor alone is more
    save(tmp_path / "model", weights, max_shard_size=600)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in weights.values())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for shard in shards:
        arrays = load_file(tmp_path / "model" / shard)
        assert all(index["weight_map"][name] == shard for name in arrays)
        assert len(arrays) == 1 or sum(a.nbytes for a in arrays.values()) <= 600
    assert count > 3
    save(tmp_path / "one", weights, max_shard_size=sum(a.nbytes for a in weights.values()))
    assert names_in(tmp_path / "one") == ["config.json", "model.safetensors"]


def test_saving_over_an_earlier_save_removes_its_weights_only(tmp_path):
    folder = tmp_path / "model"
    save(folder, random_weights(seed=1), max_shard_size=500)
    for name in ("vocab.json", "pytorch_model.bin", "my-model-00001-of-00002.safetensors"):
        (folder / name).write_text(name)
    others = ["my-model-00001-of-00002.safetensors", "pytorch_model.bin", "vocab.json"]
    save(folder, random_weights(seed=2))
    assert names_in(folder) == sorted(["config.json", "model.safetensors", *others])
    assert_same(loaded(plan(folder)), random_weights(seed=2))
    save(folder, random_weights(seed=3), max_shard_size=1500)
    assert "model.safetensors" not in names_in(folder)
    assert_same(loaded(plan(folder)), random_weights(seed=3))
    count = len(names_in(folder))
    save(folder, random_weights(seed=4), max_shard_size=3000)
    assert len(names_in(folder)) < count
    assert_same(loaded(plan(folder)), random_weights(seed=4))
    assert all((folder / name).read_text() == name for name in others)


@pytest.mark.parametrize("size", ["5GB", 500, 1500])
def test_saving_over_the_files_being_read(tmp_path, size):
    weights = random_weights()
    folder = tmp_path / "model"
    save(folder, weights, max_shard_size=700)
    result = plan(folder)
    fetch = {spec.name: stored.read for spec, stored in result.entries}
    held = result.entries[0][1].read()
    save_checkpoint(folder, TINY, fetch, param_specs(TINY), "float32", size)
    assert_same(loaded(plan(folder)), weights)
    np.testing.assert_array_equal(held, weights[EMBEDDING])


@pytest.mark.parametrize("exists", [True, False])
def test_a_failed_save_changes_nothing(tmp_path, exists):
    folder = tmp_path / "model"
    if exists:
        save(folder, random_weights(seed=1), max_shard_size=700)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}

    def fail() -> np.ndarray:
        raise RuntimeError("lost")

    fetch = {name: (lambda a=a: a) for name, a in random_weights(seed=2).items()}
    last = list(fetch)[-1]
    for bad, error in (
        (fail, RuntimeError),
        (lambda: np.ones((1, 1), np.float32), CheckpointError),
        (lambda: np.full((8,), 1e300), CheckpointError),
    ):
        with pytest.raises(error):
            save_checkpoint(folder, TINY, fetch | {last: bad}, param_specs(TINY), "float32", 700)
        after = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*")) if path.is_file()}
        assert after == before
        assert len(list(tmp_path.iterdir())) == exists


def test_a_reader_during_a_save_finds_whole_files(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    seen: list[int] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        result = replace(self, target)
        if target.parent == folder and (folder / "config.json").exists():
            for path in folder.glob("*.safetensors"):
                seen.append(len(load_file(path)))
            for path in folder.glob("*.json"):
                json.loads(path.read_text())
        return result

    save(folder, random_weights(seed=1), max_shard_size=700)
    monkeypatch.setattr(Path, "replace", watched)
    save(folder, random_weights(seed=2))
    save(folder, random_weights(seed=3), max_shard_size=500)
    assert len(seen) > 10


def test_names_must_be_those_of_the_model(tmp_path):
    weights = random_weights()
    with pytest.raises(CheckpointError, match="1 tensors unknown: extra"):
        save(tmp_path / "model", weights | {"extra": np.ones(1)})
    with pytest.raises(CheckpointError, match=r"1 tensors unknown: lm_head\.weight"):
        save(tmp_path / "model", random_weights(UNTIED), UNTIED, specs=param_specs(UNTIED, "none"))
    save(tmp_path / "model", weights | {"lm_head.weight": weights[EMBEDDING]})
    assert "lm_head.weight" not in load_file(tmp_path / "model/model.safetensors")
    del weights[EMBEDDING]
    with pytest.raises(CheckpointError, match=f"1 tensors missing: {EMBEDDING}"):
        save(tmp_path / "other", weights)
    assert names_in(tmp_path) == ["model"]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("5GB", 5 * 10**9),
        ("200MB", 2 * 10**8),
        ("10GiB", 10 * 2**30),
        ("1.5 KiB", 1536),
        ("64b", 64),
        ("2TB", 2 * 10**12),
        (123, 123),
    ],
)
def test_shard_sizes(size, expected):
    assert parse_size(size) == expected


@pytest.mark.parametrize(
    "size", ["", "5", "GB", "-5GB", "0GB", "5 XB", "5GBs", "1e3GB", 0, -1, True, 5.0, None, "0.1B"]
)
def test_bad_shard_sizes(tmp_path, size):
    with pytest.raises(CheckpointError, match=r"max_shard_size: expected .* received"):
        save(tmp_path / "model", random_weights(), max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "model"):
        with pytest.raises(CheckpointError, match="cannot be written"):
            save(folder, random_weights())
    with pytest.raises(CheckpointError, match="dtype: expected one of"):
        save(tmp_path / "model", random_weights(), dtype="int8")
    assert names_in(tmp_path) == ["file"]


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="needs links")
def test_saving_into_a_linked_cache_replaces_the_links(tmp_path):
    blobs = tmp_path / "blobs"
    save(blobs, random_weights(seed=1))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    save(snapshot, random_weights(seed=2))
    assert_same(loaded(plan(blobs)), random_weights(seed=1))
    assert_same(loaded(plan(snapshot)), random_weights(seed=2))
    shutil.rmtree(blobs)
    assert_same(loaded(plan(snapshot)), random_weights(seed=2))
