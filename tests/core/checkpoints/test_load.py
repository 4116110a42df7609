"""Finding a model's weights and reading what is there, without any framework."""

import re
from pathlib import Path

import numpy as np
import pytest

from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.errors import CheckpointError
from opt_core.params import param_specs
from tests.support.files.checkpoint_fixtures import (
    BARE,
    EMBEDDING,
    PROJECTED,
    TINY,
    WRITERS,
    assert_same,
    loaded,
    plan,
    random_weights,
    write,
    write_index,
    write_plain_safetensors,
    write_sharded,
)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("config", [TINY, PROJECTED, BARE], ids=["tiny", "projected", "bare"])
def test_every_format_loads(tmp_path, config, dtype, name):
    weights = random_weights(config, dtype=dtype)
    checkpoint = open_checkpoint(write(tmp_path, weights, name))
    assert checkpoint.format == {"model.safetensors": "safetensors"}.get(name, "torch-bin")
    assert checkpoint.files == (tmp_path / name,)
    assert checkpoint.folder == tmp_path
    result = plan_load(checkpoint, config, "causal_lm")
    assert result.config == config
    assert [spec for spec, _ in result.entries] == param_specs(config)
    found = loaded(result)
    assert all(array.dtype.name == dtype for array in found.values())
    assert_same(found, weights)


@pytest.mark.parametrize("name", WRITERS)
def test_shards_and_a_single_file_given_by_its_path(tmp_path, name):
    weights = random_weights()
    checkpoint = open_checkpoint(write_sharded(tmp_path, weights, name))
    assert len(checkpoint.files) == 2
    assert_same(loaded(plan_load(checkpoint, TINY, "causal_lm")), weights)
    other = write(tmp_path / "single", weights, name) / name
    assert_same(loaded(plan(other)), weights)
    assert open_checkpoint(other).folder == other.parent


def test_safetensors_come_first_and_an_index_before_a_single_file(tmp_path):
    right, wrong = random_weights(seed=1), random_weights(seed=2)
    write(tmp_path, wrong, "pytorch_model.bin")
    write_sharded(tmp_path, right, "pytorch_model.bin")
    assert_same(loaded(plan(tmp_path)), right)
    write(tmp_path, wrong, "model.safetensors")
    assert_same(loaded(plan(tmp_path)), wrong)
    write_sharded(tmp_path, right, "model.safetensors")
    assert_same(loaded(plan(tmp_path)), right)


@pytest.mark.parametrize("name", WRITERS)
def test_the_hubs_bare_names_and_bookkeeping(tmp_path, name):
    weights = random_weights(PROJECTED)
    bare = {key.removeprefix("model."): array for key, array in weights.items()}
    bare["decoder.version"] = np.array([3.0], np.float32)
    assert_same(loaded(plan(write(tmp_path, bare, name), PROJECTED)), weights)


def test_two_names_for_one_tensor(tmp_path):
    weights = random_weights()
    weights[EMBEDDING.removeprefix("model.")] = weights[EMBEDDING]
    with pytest.raises(CheckpointError, match=rf"are both {re.escape(EMBEDDING)}"):
        open_checkpoint(write(tmp_path, weights))


def test_a_hub_cache_of_links_is_read(tmp_path):
    blobs = write_sharded(tmp_path / "blobs", random_weights())
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    assert_same(loaded(plan(snapshot)), random_weights())


def test_folders_without_weights(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(tmp_path)
        assert "\n" not in str(caught.value)

    refused(r"no weights; expected one of model\.safetensors\.index\.json, model\.safetensors,")
    for name in ("tf_model.h5", "flax_model-00001-of-00002.msgpack", "reshard.pt"):
        (tmp_path / name).touch()
    refused(r"found flax_model\S+, reshard\.pt, tf_model\.h5: `opt-lm convert` reads these")
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    refused("model-00001-of-00002.safetensors is there, but the index of its shards is missing")
    (tmp_path / "model.safetensors").mkdir()
    refused("expected a weight file")
    (tmp_path / "model.safetensors").rmdir()
    (tmp_path / "model.safetensors").symlink_to("model.safetensors")
    refused("loop|symbolic")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").symlink_to("gone")
    refused("leads nowhere")
    write_plain_safetensors(tmp_path / "model.safetensors.tmp", {})
    (tmp_path / "model.safetensors.tmp").replace(tmp_path / "model.safetensors")
    refused("hold no tensors")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model-q4_0.gguf", "llama.cpp's"),
        ("onnx/decoder.onnx", "ONNX"),
        ("rust_model.ot", "Rust's"),
    ],
)
def test_formats_of_other_programs_are_named(tmp_path, name, kind):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} is {kind} format, which is not read: take"):
        open_checkpoint(tmp_path)


def test_paths_that_are_no_checkpoint(tmp_path):
    (tmp_path / "model.pt").touch()
    with pytest.raises(CheckpointError, match=r"model\.pt: expected a folder, .*opt-lm convert"):
        open_checkpoint(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="missing: no such file or folder"):
        open_checkpoint(tmp_path / "missing")


@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "a\\b",
        "..",
        ".",
        "",
        "a\0b",
        "c:x",
    ],
)
def test_an_index_cannot_point_out_of_its_folder(tmp_path, shard):
    folder = tmp_path / "model"
    folder.mkdir()
    write_plain_safetensors(tmp_path / "secret.safetensors", random_weights())
    write_index(folder / "model.safetensors.index.json", {"a": shard})
    with pytest.raises(CheckpointError, match="expected the name of a file beside the index"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": []}', "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": {"a": 1}}', "'a': expected the name of a file"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' occurs twice"),
        ("[" * 100_000, "not valid JSON"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not valid JSON"),
    ],
)
def test_a_damaged_index(tmp_path, content, message):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path)


def test_an_index_that_is_no_file_or_too_large(tmp_path):
    path = tmp_path / "model.safetensors.index.json"
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read: Is a directory"):
        open_checkpoint(tmp_path)
    path.rmdir()
    path.symlink_to(path)
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read"):
        open_checkpoint(tmp_path)
    path.unlink()
    with path.open("wb") as file:
        file.truncate(1 << 27)
    with pytest.raises(CheckpointError, match="expected at most"):
        open_checkpoint(tmp_path)


def test_shards_that_are_missing_or_not_what_the_index_lists(tmp_path):
    write_sharded(tmp_path, random_weights())
    first, second = sorted(tmp_path.glob("model-*"))
    first.rename(tmp_path / "kept")
    second.unlink()
    with pytest.raises(CheckpointError, match=rf"missing shards: {first.name}, {second.name}"):
        open_checkpoint(tmp_path)
    write_plain_safetensors(first, {"spare": np.ones(2, np.float32)})
    second.symlink_to(first)
    with pytest.raises(CheckpointError, match=r"\d+ tensors absent .*, 1 unlisted \(spare\)"):
        open_checkpoint(tmp_path)
