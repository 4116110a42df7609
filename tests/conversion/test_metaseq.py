"""Meta's own files, with all that their pickles hold, become the model they were cut from."""

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import conversion
from conversion.readers import open_any_checkpoint
from opt_core.errors import CheckpointError
from tests.support.files.checkpoint_fixtures import PROJECTED, UNTIED, random_weights
from tests.support.files.metaseq_fixtures import (
    EVEN,
    fake,
    forget,
    fsdp_shards,
    model_parts,
    omegaconf,
    save,
    write_metaseq,
)

MODELS = {
    "pre-LN": EVEN,
    "like 350m": PROJECTED.replace(vocab_size=24),
    "untied": UNTIED.replace(vocab_size=24),
}


def assert_holds(folder: Path, weights: Any) -> Any:
    found = open_any_checkpoint(folder)
    assert found.checkpoint.tensors.keys() == weights.keys()
    for name, array in weights.items():
        tensor = found.checkpoint.tensors[name]
        assert (tensor.shape, tensor.dtype) == (array.shape, array.dtype), name
        np.testing.assert_array_equal(tensor.read(), array, err_msg=name)
        half = tensor.rows(1, max(2, array.shape[0] // 2))
        np.testing.assert_array_equal(half.read(), array[1 : max(2, array.shape[0] // 2)])
    return found


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_way_of_cutting_is_undone(name: str, parts: int, shards: int, tmp_path: Path):
    config = MODELS[name]
    weights = random_weights(config, dtype="float16")
    write_metaseq(tmp_path, config, weights, parts, shards)
    found = assert_holds(tmp_path, weights)
    assert found.read_config() == config.replace(tie_word_embeddings=True)
    assert "derived" in found.notes[0]
    assert len(found.checkpoint.files) == parts * shards


def test_a_conversion_of_parts_and_shards(tmp_path: Path):
    weights = random_weights(EVEN)
    write_metaseq(tmp_path / "source", EVEN, weights, 2, 3)
    any_file = tmp_path / "source" / "checkpoint_last-model_part-1-shard2.pt"
    for i, source in enumerate((tmp_path / "source", any_file)):
        conversion.convert(source, tmp_path / f"new{i}")
        assert_holds(tmp_path / f"new{i}", weights)


def test_a_config_beside_the_file_is_taken(tmp_path: Path):
    write_metaseq(tmp_path, EVEN, random_weights(EVEN), 1, 1)
    EVEN.replace(dropout=0.3, num_attention_heads=2).save_pretrained(tmp_path)
    found = open_any_checkpoint(tmp_path)
    assert (found.read_config().dropout, found.read_config().num_attention_heads) == (0.3, 2)
    assert not found.notes


def test_projections_of_their_own_and_one_folder_with_several(tmp_path: Path):
    weights = random_weights(EVEN)
    write_metaseq(tmp_path, EVEN, weights, 2, 1)
    (state,) = model_parts(weights, 1)
    for name in [n for n in state if "qkv_proj" in n]:
        for letter, third in zip("kvq", state.pop(name).chunk(3), strict=True):
            state[name.replace("qkv", letter)] = third
    save(tmp_path / "other.pt", EVEN, {"model": state})
    assert_holds(tmp_path / "other.pt", weights)
    assert_holds(tmp_path, weights)  # reshard comes first
    for path in tmp_path.glob("reshard*"):
        path.rename(tmp_path / f"x{path.name}")
    with pytest.raises(CheckpointError, match="expected one checkpoint, found other, xresh"):
        open_any_checkpoint(tmp_path)


class Runs:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_nothing_of_a_pickle_is_imported_or_run(tmp_path: Path):
    weights, marker = random_weights(EVEN), tmp_path / "ran"
    (state,) = model_parts(weights, 1)
    loaded = set(sys.modules)
    content = {
        "extra_state": [Runs(f"touch {marker}"), fake("metaseq.x", "Y", z=Runs(f"touch {marker}"))],
        "sets": [{1, 2}, frozenset([3]), {4: {(5, 6): 7}}, 2**70, b"x", range(3), np.arange(3)],
    }
    settings = omegaconf({"model": {"decoder_attention_heads": 4}})
    torch.save({**content, "cfg": settings, "model": state}, tmp_path / "reshard.pt")
    forget()
    assert_holds(tmp_path / "reshard.pt", weights)
    assert not marker.exists()
    assert not {n for n in set(sys.modules) - loaded if n.startswith(("metaseq", "omegaconf"))}
    with pytest.raises(ModuleNotFoundError):  # the attack and the classes are real ones
        torch.load(tmp_path / "reshard.pt", weights_only=False)
    assert marker.exists()


def broken(folder: Path, how: str) -> None:
    weights = random_weights(EVEN)
    if how in ("a part is missing", "a shard is missing", "parts differ"):
        write_metaseq(folder, EVEN, weights, 4, 2)
        if how == "a part is missing":
            for path in folder.glob("*part-2-*"):
                path.unlink()
        elif how == "a shard is missing":
            (folder / "checkpoint_last-model_part-2-shard1.pt").unlink()
        else:
            (state, *_) = model_parts(random_weights(EVEN.replace(num_hidden_layers=1)), 4)
            (folder / "x").mkdir()
            for j, shard in enumerate(fsdp_shards(state, 2)):
                metadata = {"param_metadata": shard["param_metadata"], "buffer_names": []}
                content = {"model": shard["model"], "shard_metadata": metadata}
                save(folder / f"checkpoint_last-model_part-2-shard{j}.pt", EVEN, content)
        return
    (state,) = model_parts(weights, 1)
    first, second = fsdp_shards(state, 2)
    metadata = {"param_metadata": first["param_metadata"]}
    info = first["param_metadata"][0]["params"]["flat_param_0"]
    match how:
        case "no metadata":
            metadata = {}
        case "a wrong size":
            info["shapes"][0] = torch.Size([7, 7])
        case "a negative size":
            info["shapes"][0] = (-24, 8)
        case "a wrong padding":
            info["padding"] = 10**9
        case "a missing name":
            info["names"].pop()
        case "a missing parameter":
            del first["model"]["flat_param_0"]
        case "a parameter too many":
            first["model"]["flat_param_9"] = torch.zeros(3)
        case "metadata of another kind":
            metadata = {"param_metadata": [3]}
    save(folder / "c-shard0.pt", EVEN, {"model": first["model"], "shard_metadata": metadata})
    second = {
        "model": second["model"],
        "shard_metadata": {"param_metadata": second["param_metadata"]},
    }
    save(folder / "c-shard1.pt", EVEN, second)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a part is missing", "missing"),
        ("a shard is missing", "missing"),
        ("parts differ", "not in every model part|no flat parameter|differs"),
        ("no metadata", "no shard_metadata|not as FSDP"),
        ("a wrong size", "describes .* elements"),
        ("a negative size", "expected a shape"),
        ("a wrong padding", "padding"),
        ("a missing name", "describes"),
        ("a missing parameter", "no flat parameter"),
        ("a parameter too many", "does not describe"),
        ("metadata of another kind", "not as FSDP"),
    ],
)
def test_what_does_not_fit_is_named(how: str, message: str, tmp_path: Path):
    broken(tmp_path, how)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_any_checkpoint(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_what_nothing_says_is_asked_for(tmp_path: Path):
    weights = random_weights(EVEN)
    (state,) = model_parts(weights, 1)
    torch.save({"model": state}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"how many heads; put the model's config\.json"):
        open_any_checkpoint(tmp_path / "a.pt").read_config()
    del state["decoder.layer_norm.weight"], state["decoder.layer_norm.bias"]
    save(tmp_path / "b.pt", EVEN, {"model": state})
    with pytest.raises(CheckpointError, match="before June 2022"):
        open_any_checkpoint(tmp_path / "b.pt").read_config()
