"""Finding, comparing, streaming and saving checkpoints, without any framework."""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from opt_core.checkpoint import Checkpoint, LoadPlan, open_checkpoint, plan_load, save_checkpoint
from opt_core.checkpoint_writer import parse_size
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.params import Head, param_specs
from tests.core.checkpoint_fixtures import (
    BARE,
    PROJECTED,
    TINY,
    Cut,
    random_weights,
    write_plain_safetensors,
    write_torch_file,
)

Weights = dict[str, np.ndarray]
EMBEDDING = "model.decoder.embed_tokens.weight"
POSITIONS = "model.decoder.embed_positions.weight"
FINAL_NORM = "model.decoder.final_layer_norm"
WRITERS: dict[str, Callable[..., None]] = {
    "model.safetensors": write_plain_safetensors,
    "pytorch_model.bin": write_torch_file,
}


def write(folder: Path, weights: Mapping[str, Any], name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    WRITERS[name](folder / name, weights)
    return folder


def write_sharded(folder: Path, weights: Weights, name: str = "model.safetensors") -> Path:
    """Two shards and their index, as the hub has them."""
    folder.mkdir(exist_ok=True)
    stem, _, suffix = name.partition(".")
    names = list(weights)
    weight_map: dict[str, str] = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        shard = f"{stem}-0000{i}-of-00002.{suffix}"
        WRITERS[name](folder / shard, {n: weights[n] for n in part})
        weight_map |= dict.fromkeys(part, shard)
    write_index(folder / f"{name}.index.json", weight_map)
    return folder


def write_index(path: Path, weight_map: object) -> None:
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def plan(folder: Path, config: OPTConfig = TINY, head: Head = "causal_lm") -> LoadPlan:
    return plan_load(open_checkpoint(folder), config, head)


def loaded(plan: LoadPlan, dtype: str | None = None) -> Weights:
    return {spec.name: array for spec, array in plan.stream(dtype)}


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


def save(folder: Path, weights: Weights, config: OPTConfig = TINY, **settings: Any) -> None:
    """Saves a causal language model; settings are those of `save_checkpoint`."""
    settings = {"dtype": "float32", "specs": param_specs(config)} | settings
    fetch = {name: (lambda array=array: array) for name, array in weights.items()}
    save_checkpoint(folder, config, fetch, **settings)


# --- finding the weights ----------------------------------------------------------------------


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
        ("", "not readable as JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a weight_map"),
        ('{"weight_map": []}', "expected a weight_map"),
        ('{"weight_map": {}}', "expected a weight_map"),
        ('{"weight_map": {"a": 1}}', "'a': expected the name of a file"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' occurs twice"),
        ("[" * 100_000, "not readable as JSON"),
        ("\ud800".encode("utf-8", "surrogatepass"), "not readable as JSON"),
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


# --- comparing with the configuration ---------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(write(tmp_path / "tiny", random_weights()))


def test_everything_that_does_not_fit_is_in_one_error(tmp_path):
    weights = random_weights()
    for i in range(2):
        del weights[f"model.decoder.layers.{i}.fc1.bias"]
    weights["model.decoder.surprise"] = np.ones(1, np.float32)
    weights["model.decoder.evil\nname"] = np.ones(1, np.float32)
    weights[EMBEDDING] = weights[EMBEDDING][:20]
    weights[f"{FINAL_NORM}.bias"] = np.ones(8, np.int8)
    with pytest.raises(CheckpointError) as caught:
        plan(write(tmp_path, weights))
    message = str(caught.value)
    for part in (
        str(tmp_path),
        "2 missing: model.decoder.layers.{0-1}.fc1.bias;",
        r"2 unexpected: model.decoder.surprise, 'model.decoder.evil\nname';",
        f"1 of another shape: {EMBEDDING} (expected [21, 8], received [20, 8]);",
        f"1 of another type: {FINAL_NORM}.bias (int8 is no floating-point type).",
        "set vocab_size to 20 in config.json",
    ):
        assert part in message
    assert "\n" not in message


def test_a_long_list_is_counted_and_shortened(tiny):
    with pytest.raises(CheckpointError, match=r"16 missing: (\S+ ?){8}and 8 more kinds\. "):
        plan_load(tiny, TINY.replace(num_hidden_layers=3), "causal_lm")


@pytest.mark.parametrize(
    ("changes", "hint"),
    [
        ({"vocab_size": 20}, "set vocab_size to 21 in"),
        ({"max_position_embeddings": 12}, "drop the position table's first 2 rows"),
        ({"max_position_embeddings": 20}, "set max_position_embeddings to 10 in"),
        ({"word_embed_proj_dim": 6}, "lacks project_in and project_out: check word_embed_proj_dim"),
        ({"enable_bias": False}, "set enable_bias to true in"),
        ({"layer_norm_elementwise_affine": False}, "set layer_norm_elementwise_affine to true in"),
        ({"num_hidden_layers": 1}, "the checkpoint has 2 layers: set num_hidden_layers to 2 in"),
        ({"num_hidden_layers": 4}, "the checkpoint has 2 layers: set num_hidden_layers to 2 in"),
        ({"_remove_final_layer_norm": True}, "check do_layer_norm_before and _remove_final"),
        ({"do_layer_norm_before": False}, "check do_layer_norm_before and _remove_final"),
        ({"ffn_dim": 8}, None),
    ],
)
def test_hints_name_the_likely_cause_and_no_other(tiny, changes, hint):
    with pytest.raises(CheckpointError) as caught:
        plan_load(tiny, TINY.replace(**changes), "causal_lm")
    _, _, hints = str(caught.value).rpartition(". ")
    if hint is None:
        assert "config.json" not in str(caught.value)
    else:
        assert hint in hints
        if "word_embed_proj_dim" not in changes:
            assert "; " not in hints


@pytest.mark.parametrize(
    ("flag", "config"),
    [("enable_bias", TINY), ("layer_norm_elementwise_affine", TINY)],
)
def test_hints_when_the_file_lacks_what_the_configuration_wants(tmp_path, flag, config):
    weights = random_weights(config.replace(**{flag: False}))
    with pytest.raises(CheckpointError, match=f"set {flag} to false in config.json") as caught:
        plan(write(tmp_path, weights), config)
    assert "17785" not in str(caught.value)


def test_a_projection_the_configuration_does_not_know(tmp_path):
    folder = write(tmp_path, random_weights(PROJECTED))
    with pytest.raises(CheckpointError, match="set word_embed_proj_dim to 6 in"):
        plan(folder, PROJECTED.replace(word_embed_proj_dim=8))


def test_a_lost_final_norm_is_an_error_that_says_so(tmp_path):
    weights = random_weights()
    del weights[f"{FINAL_NORM}.weight"], weights[f"{FINAL_NORM}.bias"]
    folder = write(tmp_path, weights)
    with pytest.raises(CheckpointError, match=r"pull/17785.*\"_remove_final_layer_norm\": true"):
        plan(folder)
    assert_same(loaded(plan(folder, TINY.replace(_remove_final_layer_norm=True))), weights)


def test_a_hostile_layer_number(tmp_path):
    weights = random_weights()
    weights[f"model.decoder.layers.{'9' * 5000}.fc1.weight"] = np.ones(1, np.float32)
    weights["model.decoder.layers.999999.fc1.weight"] = np.ones(1, np.float32)
    with pytest.raises(CheckpointError, match="2 unexpected"):
        plan(write(tmp_path, weights))


# --- heads ------------------------------------------------------------------------------------

HEADS: list[Head] = ["none", "causal_lm", "sequence_classification", "question_answering"]
UNTIED = TINY.replace(tie_word_embeddings=False)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("stored_head", HEADS)
def test_a_checkpoint_of_one_head_loads_into_another(tmp_path, stored_head, head):
    weights = random_weights(TINY, stored_head)
    result = plan(write(tmp_path, weights), TINY, head)
    own = {spec.name for spec in param_specs(TINY, head)}
    assert_same(loaded(result), {name: weights[name] for name in weights if name in own})
    assert {spec.name for spec in result.fresh} == own - weights.keys()
    assert bool(result.fresh) == (head not in (stored_head, "none", "causal_lm"))
    assert result.config == TINY


def test_part_of_a_head_is_an_error(tmp_path):
    weights = random_weights(TINY, "question_answering")
    del weights["qa_outputs.bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: qa_outputs\.bias"):
        plan(write(tmp_path, weights), TINY, "question_answering")


def test_a_head_of_another_number_of_labels_is_an_error(tmp_path):
    folder = write(tmp_path, random_weights(TINY, "sequence_classification"))
    with pytest.raises(CheckpointError, match=r"score.weight \(expected \[5, 8\], received \[2, 8"):
        plan(folder, TINY.replace(num_labels=5), "sequence_classification")


@pytest.mark.parametrize("rows_at_once", [1 << 26, 64, 1])
def test_a_tied_head_with_equal_contents_is_not_loaded(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr("opt_core.checkpoint._COMPARED_BYTES", rows_at_once)
    weights = random_weights()
    result = plan(write(tmp_path, weights | {"lm_head.weight": weights[EMBEDDING]}))
    assert result.config.tie_word_embeddings
    assert_same(loaded(result), weights)
    different = weights[EMBEDDING].copy()
    different[-1, -1] += 1
    result = plan(write(tmp_path, weights | {"lm_head.weight": different}))
    assert not result.config.tie_word_embeddings
    assert_same(loaded(result), weights | {"lm_head.weight": different})


def test_a_tied_head_in_the_same_storage_is_not_even_read(tmp_path, monkeypatch):
    weights: dict[str, Any] = dict(random_weights())
    weights["lm_head.weight"] = Cut(EMBEDDING, 0, (21, 8), (8, 1))
    checkpoint = open_checkpoint(write(tmp_path, weights, "pytorch_model.bin"))
    monkeypatch.setattr("opt_core.tensor_file.StoredTensor.read", lambda self: pytest.fail("read"))
    assert plan_load(checkpoint, TINY, "causal_lm").config.tie_word_embeddings


def test_a_different_head_under_a_tied_configuration_is_honoured(tmp_path):
    weights = random_weights(UNTIED)
    result = plan(write(tmp_path, weights), TINY)
    assert result.config == UNTIED
    assert_same(loaded(result), weights)


@pytest.mark.parametrize("head", ["none", "sequence_classification", "question_answering"])
def test_other_heads_leave_the_language_model_head_alone(tmp_path, head):
    result = plan(write(tmp_path, random_weights(UNTIED)), TINY, head)
    assert result.config == TINY
    assert "lm_head.weight" not in loaded(result)


def test_an_untied_configuration_needs_its_head(tiny):
    with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight$"):
        plan_load(tiny, UNTIED, "causal_lm")


def test_a_tied_head_of_another_shape_is_an_error(tmp_path):
    weights = random_weights()
    weights["lm_head.weight"] = weights[EMBEDDING][:20]
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \(expected \[21, 8\], received"):
        plan(write(tmp_path, weights))


# --- streaming --------------------------------------------------------------------------------


def test_stream_maps_what_needs_no_cast_and_casts_the_rest(tmp_path):
    weights = random_weights()
    result = plan(write(tmp_path, weights))
    for (_, a), (_, b) in zip(result.stream(), result.stream("float32"), strict=True):
        assert np.shares_memory(a, b)
    for spec, array in result.stream("bfloat16"):
        np.testing.assert_array_equal(array, weights[spec.name].astype(ml_dtypes.bfloat16))
    with pytest.raises(CheckpointError, match="received 'int4'"):
        next(result.stream("int4"))


def test_stream_follows_the_files_and_reports_progress(tmp_path):
    weights = dict(reversed(random_weights().items()))
    result = plan(write_sharded(tmp_path, weights))
    calls: list[tuple[int, int]] = []
    names = [spec.name for spec, _ in result.stream(progress=lambda *call: calls.append(call))]
    assert names == list(weights)
    sizes = np.cumsum([array.nbytes for array in weights.values()]).tolist()
    assert calls == [(size, sizes[-1]) for size in sizes]


def test_a_cast_out_of_range_names_the_tensor(tmp_path):
    weights = random_weights()
    weights[POSITIONS][0, 0] = 1e30
    with pytest.raises(CheckpointError, match=rf"{re.escape(POSITIONS)}: values beyond the range"):
        loaded(plan(write(tmp_path, weights)), "float16")


# --- saving -----------------------------------------------------------------------------------


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
    save(tmp_path / "model", weights, max_shard_size=700)
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in weights.values())
    shards = sorted(set(index["weight_map"].values()))
    count = len(shards)
    assert shards == [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for shard in shards:
        arrays = load_file(tmp_path / "model" / shard)
        assert all(index["weight_map"][name] == shard for name in arrays)
        assert len(arrays) == 1 or sum(a.nbytes for a in arrays.values()) <= 700
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
