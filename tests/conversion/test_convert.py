"""`convert` as a caller meets it: types, shards, sidecar files, progress, refusals."""

import json
import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import conversion
from conversion import writers
from conversion.formats import flax_msgpack
from conversion.readers import open_any_checkpoint
from conversion.streaming.lazy_tensors import Buffer, contiguous
from conversion.streaming.prefetch import Prefetcher
from conversion.writers import WRITERS
from opt_core.errors import CheckpointError, ConfigError, OPTError
from opt_core.text.tokenizer import OPTTokenizer
from tests.support.files.checkpoint_fixtures import (
    EMBEDDING,
    PROJECTED,
    TINY,
    UNTIED,
    random_weights,
    type_of,
    write,
    write_sharded,
)
from tests.support.files.format_fixtures import assert_values, make, values
from tests.support.files.tiny_folder import save_model
from tests.support.small_tokenizer import write_opt_folder

SHARDED = [name for name, target in WRITERS.items() if target.sharded]


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_types_are_changed_on_the_way(to: str, dtype: str, tmp_path: Path):
    weights = make(tmp_path / "a")
    if (to, dtype) == ("tf-h5", "bfloat16"):
        with pytest.raises(CheckpointError, match="no bfloat16"):
            conversion.convert(tmp_path / "a", tmp_path / "b", to, dtype)
        return
    conversion.convert(tmp_path / "a", tmp_path / "b", to, dtype)
    assert_values(tmp_path / "b", {n: a.astype(type_of[dtype]) for n, a in weights.items()})
    if to != "keras-hub":
        assert json.loads((tmp_path / "b" / "config.json").read_text())["torch_dtype"] == dtype


def test_a_value_beyond_the_type_is_named(tmp_path: Path):
    weights = make(tmp_path / "a")
    weights["model.decoder.layers.1.fc1.weight"][3, 2] = 1e6
    write(tmp_path / "a", weights)
    with pytest.raises(CheckpointError, match=r"layers\.1\.fc1\.weight: values beyond the range"):
        conversion.convert(tmp_path / "a", tmp_path / "b", "flax-msgpack", "float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def test_nan_and_infinity_are_told(tmp_path: Path):
    for dtype in ("float64", "float32", "float16", "bfloat16"):
        weights = random_weights(dtype=dtype)
        weights[EMBEDDING][3, 2:5] = [np.nan, np.inf, -np.inf]
        weights["model.decoder.layers.0.fc1.bias"][0] = np.finfo(np.float16).max
        make(tmp_path / dtype)
        conversion_folder = tmp_path / dtype
        (conversion_folder / "model.safetensors").unlink()
        write(conversion_folder, weights, "pytorch_model.bin")
        done = conversion.convert(conversion_folder, tmp_path / f"{dtype}-new")
        assert done.notes == (f"{EMBEDDING}: 3 values are NaN or infinite",)
        assert_values(tmp_path / f"{dtype}-new", weights)


@pytest.mark.parametrize("to", SHARDED)
@pytest.mark.parametrize("config", [TINY, PROJECTED, UNTIED], ids=["pre", "post", "untied"])
def test_shards_and_their_index(to: str, config: Any, tmp_path: Path):
    weights = make(tmp_path / "a", config)
    done = conversion.convert(tmp_path / "a", tmp_path / "b", to, max_shard_size="2KB")
    assert len(done.files) > 2
    index = json.loads((tmp_path / "b" / f"{WRITERS[to].file}.index.json").read_text())
    assert set(index["weight_map"].values()) == done.files.keys()
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in weights.values())
    assert done.parameters == sum(a.size for a in weights.values())
    assert_values(tmp_path / "b", weights)
    stale = tmp_path / "b" / WRITERS[to].file
    stale.write_bytes(b"from before the index")  # as the hub has one of opt-13b
    assert_values(tmp_path / "b", weights)
    assert_values(tmp_path / "b" / f"{WRITERS[to].file}.index.json", weights)
    assert "stale" in conversion.describe(tmp_path / "b").problems[0]
    (tmp_path / "b" / next(iter(done.files))).unlink()
    with pytest.raises(CheckpointError, match="missing shards"):
        open_any_checkpoint(tmp_path / "b")


def test_arrays_of_flax_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flax_msgpack, "MAX_CHUNK", 200)
    for name, config in {"pre": TINY, "untied": UNTIED}.items():
        weights = make(tmp_path / name, config)
        conversion.convert(tmp_path / name, tmp_path / f"{name}2", "flax-msgpack")
        assert (
            b"__msgpack_chunked_array__" in (tmp_path / f"{name}2/flax_model.msgpack").read_bytes()
        )
        assert_values(tmp_path / f"{name}2", weights)
        conversion.convert(tmp_path / f"{name}2", tmp_path / f"{name}3")
        assert_values(tmp_path / f"{name}3", weights)


def test_flax_itself_reads_its_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    serialization = pytest.importorskip("flax.serialization")
    make(tmp_path / "a")
    monkeypatch.setattr(flax_msgpack, "MAX_CHUNK", 200)
    conversion.convert(tmp_path / "a", tmp_path / "b", "flax-msgpack")
    data = (tmp_path / "b" / "flax_model.msgpack").read_bytes()
    tree = serialization.msgpack_restore(data)
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 200)
    assert serialization.msgpack_serialize(tree) == data
    np.testing.assert_array_equal(
        tree["model"]["decoder"]["embed_tokens"]["embedding"], values(tmp_path / "a")[EMBEDDING]
    )


def test_torch_loads_what_is_written_for_it(tmp_path: Path):
    weights = make(tmp_path / "a", dtype="bfloat16")
    for to, file in (("torch-bin", "pytorch_model.bin"), ("metaseq", "reshard.pt")):
        conversion.convert(tmp_path / "a", tmp_path / to, to)
        for mapped in (False, True):
            state = torch.load(tmp_path / to / file, weights_only=True, mmap=mapped)
            if to == "metaseq":
                assert state["cfg"]["model"]["decoder_attention_heads"] == 2
                state = state["model"]
                fused = state["decoder.layers.1.self_attn.qkv_proj.weight"].view(torch.int16)
                three = [f"model.decoder.layers.1.self_attn.{c}_proj.weight" for c in "kvq"]
                expected = np.concatenate([weights[name] for name in three])
                assert np.array_equal(fused.numpy(), expected.view(np.int16))
            else:
                assert state.keys() == weights.keys()
                for name, tensor in state.items():
                    assert np.array_equal(tensor.view(torch.int16), weights[name].view(np.int16))


@pytest.mark.parametrize("to", SHARDED)
@pytest.mark.parametrize("head", ["sequence_classification", "question_answering"])
def test_other_heads(head: Any, to: str, tmp_path: Path):
    weights = make(tmp_path / "a", head=head)
    conversion.convert(tmp_path / "a", tmp_path / "b", to)
    assert_values(tmp_path / "b", weights)
    (architecture,) = json.loads((tmp_path / "b" / "config.json").read_text())["architectures"]
    assert architecture.lower() == f"optfor{head.replace('_', '')}"
    for cannot in ("metaseq", "keras-hub"):
        with pytest.raises(ConfigError, match=r"score|qa_outputs"):
            conversion.convert(tmp_path / "b", tmp_path / "c", cannot)


def test_a_head_that_equals_the_embedding_is_left_out_and_another_one_is_kept(tmp_path: Path):
    weights = make(tmp_path / "a")
    write(tmp_path / "a", {**weights, "lm_head.weight": weights[EMBEDDING]})
    conversion.convert(tmp_path / "a", tmp_path / "b", "flax-msgpack")
    assert_values(tmp_path / "b", weights)
    other = {**weights, "lm_head.weight": weights[EMBEDDING] + 1}
    write(tmp_path / "a", other)
    done = conversion.convert(tmp_path / "a", tmp_path / "c", "tf-h5")
    assert "ties every head" in done.notes[0]
    assert not open_any_checkpoint(tmp_path / "c").read_config().tie_word_embeddings
    assert_values(tmp_path / "c", other)


@pytest.mark.parametrize("to", WRITERS)
def test_what_goes_with_the_weights(to: str, tmp_path: Path):
    source = save_model(tmp_path / "a")
    (source / "LICENSE.md").write_text("terms")
    assert not (source / "tokenizer.json").exists()
    conversion.convert(source, tmp_path / "b", to)
    assert (tmp_path / "b" / "LICENSE.md").read_text() == "terms"
    before = (source / "generation_config.json").read_bytes()
    assert (tmp_path / "b" / "generation_config.json").read_bytes() == before
    conversion.convert(tmp_path / "b", tmp_path / "c")  # through KerasHub's names too
    text = "the dog, and Hello world"
    expected = OPTTokenizer.from_pretrained(source)([text]).input_ids
    for folder in (tmp_path / "b", tmp_path / "c"):
        assert (folder / "tokenizer.json").exists()
        if to == "keras-hub" and folder.name == "b":
            continue  # whose tokenizer.json is another
        assert OPTTokenizer.from_pretrained(folder)([text]).input_ids == expected
        (folder / "vocab.json").unlink()
        assert OPTTokenizer.from_pretrained(folder)([text]).input_ids == expected
    assert conversion.verify(source, tmp_path / "c", max_new_tokens=4).max_difference == 0


def test_a_broken_tokenizer_stops_it_before_the_weights(tmp_path: Path):
    make(tmp_path / "a")
    write_opt_folder(tmp_path / "a")
    (tmp_path / "a" / "merges.txt").unlink()
    with pytest.raises(OPTError, match=r"no merges\.txt"):
        conversion.convert(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("to", WRITERS)
def test_progress_counts_every_byte(to: str, tmp_path: Path):
    weights = make(tmp_path / "a", dtype="float16")
    seen: list[tuple[int, int]] = []
    conversion.convert(
        tmp_path / "a",
        tmp_path / "b",
        to,
        "float32",
        progress=lambda *amounts: seen.append(amounts),
    )
    total = sum(array.nbytes for array in weights.values())
    assert seen == sorted(seen)
    assert {whole for _, whole in seen} == {total}
    assert total - 8 <= seen[-1][0] <= total
    assert len(seen) > 20


def test_what_cannot_be_asked_for(tmp_path: Path):
    make(tmp_path / "a")
    for kwargs, message in (
        ({"to": "onnx"}, "to: expected one of safetensors"),
        ({"dtype": "int8"}, "dtype: expected"),
        ({"max_shard_size": "big"}, "max_shard_size"),
        ({"revision": "v2"}, "is for hub ids"),
    ):
        options: dict[str, Any] = kwargs
        with pytest.raises(CheckpointError, match=message):
            conversion.convert(tmp_path / "a", tmp_path / "b", **options)
    with pytest.raises(CheckpointError, match="already exists"):
        conversion.convert(tmp_path / "a", tmp_path / "a")
    with pytest.raises(CheckpointError, match="no such folder"):
        conversion.convert(tmp_path / "nothing", tmp_path / "b")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no weights"):
        conversion.convert(tmp_path / "empty", tmp_path / "b")
    (tmp_path / "a" / "model.safetensors").rename(
        tmp_path / "a" / "model-00001-of-00002.safetensors"
    )
    with pytest.raises(CheckpointError, match="index of its shards is missing"):
        conversion.convert(tmp_path / "a", tmp_path / "b")
    conversion.convert("mini", tmp_path / "empty")  # an empty folder will do
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]


def test_of_two_formats_the_safer_one_and_any_by_its_name(tmp_path: Path):
    old = make(tmp_path / "a", seed=1)
    conversion.convert(tmp_path / "a", tmp_path / "flax", "flax-msgpack")
    conversion.convert(tmp_path / "a", tmp_path / "tf", "tf-h5")
    new = make(tmp_path / "a", seed=2)
    for path in [*(tmp_path / "flax").glob("*.msgpack"), *(tmp_path / "tf").glob("*.h5")]:
        path.rename(tmp_path / "a" / path.name)
    assert_values(tmp_path / "a", new)
    assert_values(tmp_path / "a" / "flax_model.msgpack", old)
    assert_values(tmp_path / "a" / "tf_model.h5", old)
    conversion.convert(tmp_path / "a" / "tf_model.h5", tmp_path / "b")
    assert_values(tmp_path / "b", old)


def test_an_index_that_is_not_the_first_choice_is_read_when_named(tmp_path: Path):
    new = make(tmp_path / "a", seed=2)
    old = random_weights(seed=1)
    write_sharded(tmp_path / "a", old, "pytorch_model.bin")
    assert_values(tmp_path / "a", new)
    assert_values(tmp_path / "a" / "pytorch_model.bin.index.json", old)


def test_links_are_followed_and_files_copied(tmp_path: Path):
    weights = make(tmp_path / "real")
    (tmp_path / "linked").mkdir()
    for path in (tmp_path / "real").iterdir():
        (tmp_path / "linked" / path.name).symlink_to(path)
    conversion.convert(tmp_path / "linked", tmp_path / "new", "torch-bin")
    assert_values(tmp_path / "new", weights)
    assert not any(os.path.islink(p) for p in (tmp_path / "new").iterdir())


@pytest.mark.parametrize("name", ["LICENSE", "generation_config.json", "vocab.json"])
def test_a_link_out_of_the_folder_is_not_published(name: str, tmp_path: Path):
    make(tmp_path / "a")
    (tmp_path / "secret").write_text("{}")
    (tmp_path / "a" / name).symlink_to("../secret")
    with pytest.raises(CheckpointError, match=f"{name}: a link out of its folder"):
        conversion.convert(tmp_path / "a", tmp_path / "b")
    assert not (tmp_path / "b").exists()
    cached = tmp_path / "models--x" / "snapshots" / "abc"
    cached.parent.mkdir(parents=True)
    (tmp_path / "a").rename(cached)
    (cached / name).unlink()
    (tmp_path / "models--x" / "blobs").mkdir()
    (tmp_path / "models--x" / "blobs" / "1").write_text("terms")
    (cached / "LICENSE").symlink_to("../../blobs/1")  # as the hub's cache is laid out
    conversion.convert(cached, tmp_path / "b")
    assert (tmp_path / "b" / "LICENSE").read_text() == "terms"


def test_the_vocabulary_that_metaseq_ships(tmp_path: Path):
    make(tmp_path / "a")
    conversion.convert(tmp_path / "a", tmp_path / "b", "metaseq")
    write_opt_folder(tmp_path / "b")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "b" / name).rename(tmp_path / "b" / f"gpt2-{name}")
    conversion.convert(tmp_path / "b", tmp_path / "c")
    text = "the dog"
    expected = OPTTokenizer.from_pretrained(write_opt_folder(tmp_path / "d"))([text]).input_ids
    assert OPTTokenizer.from_pretrained(tmp_path / "c")([text]).input_ids == expected


@pytest.mark.parametrize("to", ["tf-h5", "keras-hub"])
def test_without_h5py_it_says_what_to_install(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    make(tmp_path / "a")
    conversion.convert(tmp_path / "a", tmp_path / "b", to)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for source, new in ((tmp_path / "a", to), (tmp_path / "b", "safetensors")):
        with pytest.raises(CheckpointError, match=r"need h5py: pip install \"opt-lm\[formats\]\""):
            conversion.convert(source, tmp_path / "c", new)


@pytest.mark.parametrize("to", WRITERS)
def test_no_more_than_two_tensors_are_held(
    to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """However many layers there are: eleven, of which "10" is written before "2" by Flax."""
    make(tmp_path / "a", TINY.replace(num_hidden_layers=11))
    held: set[int] = set()
    most = 0

    def fetch(tensor: Any, *others: Any) -> Any:
        nonlocal most
        array = tensor.read().copy()
        held.add(key := id(tensor))
        most = max(most, len(held))
        weakref.finalize(array, held.discard, key)
        return array, 0

    monkeypatch.setattr(writers, "_fetch", fetch)
    conversion.convert(tmp_path / "a", tmp_path / "b", to)
    assert most <= 3  # one is written, one is ready, and one is being let go of


def test_a_buffer_is_used_again_and_grows():
    buffer, matrix = Buffer(), np.arange(6, dtype=np.float32).reshape(2, 3)
    first = contiguous(matrix.T, buffer)
    np.testing.assert_array_equal(first, matrix.T)
    second = contiguous((matrix[:, 1:] + 2).T, buffer)
    assert second.ctypes.data == first.ctypes.data
    np.testing.assert_array_equal(second, (matrix[:, 1:] + 2).T)
    larger = contiguous(np.ones((4, 5), np.float32).T, buffer)
    np.testing.assert_array_equal(larger, np.ones((5, 4)))
    np.testing.assert_array_equal(second, (matrix[:, 1:] + 2).T)
    assert not np.shares_memory(larger, contiguous(matrix.T))


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("to", WRITERS)
def test_a_tensor_that_is_being_written_is_not_overwritten(
    to: str, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every tensor through a buffer; the next one is complete before the last one is looked at."""
    state = make(tmp_path / "a", TINY.replace(num_hidden_layers=5))
    used: list[int] = []

    def copied(array: Any, buffer: Buffer) -> Any:
        out = buffer.array(array.shape, array.dtype)
        out[...] = array
        used.append(out.ctypes.data)
        return out

    class Eager(Prefetcher[Any]):
        def take(self, index: int) -> Any:
            result = super().take(index)
            for future in self._started.values():
                future.exception()
            return result

    monkeypatch.setattr(writers, "contiguous", copied)
    monkeypatch.setattr(writers, "Prefetcher", Eager)
    conversion.convert(tmp_path / "a", tmp_path / "b", to, max_shard_size=shard)
    assert len(used) > 20
    assert_values(tmp_path / "b", state)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system takes no advice")
@pytest.mark.parametrize("source", WRITERS)
def test_the_disk_is_told_what_comes_next(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Every tensor but the first; through all that it may be made of."""
    make(tmp_path / "a")
    conversion.convert(tmp_path / "a", tmp_path / "b", source)
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda file, start, length, _: asked.append((start, length))
    )
    conversion.convert(tmp_path / "b", tmp_path / "c", "torch-bin")
    tensors = list(open_any_checkpoint(tmp_path / "b").checkpoint.tensors.values())
    stored = [t.nbytes for t in tensors]
    if source == "keras-hub":  # whose position table is in two places
        rows = 2 * TINY.hidden_size * 4
        stored += [rows, TINY.max_position_embeddings * TINY.hidden_size * 4]
        stored.remove(rows + stored[-1])
    assert len(asked) in (len(stored) - 1, len(stored))
    assert set(stored) >= {length for _, length in asked}
    assert sum(stored) - sum(length for _, length in asked) <= max(stored)


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_transposed_matrix_of_any_size_is_copied_as_it_is(dtype: str):
    matrix = np.random.default_rng(0).normal(size=(130, 257)).astype(type_of[dtype])
    for array in (matrix.T, matrix[:, ::2], matrix[1:, 3:].T, matrix[:0].T):
        copied = contiguous(array)
        assert copied.flags.c_contiguous
        np.testing.assert_array_equal(copied, array)
