"""Files beside the weights: indices, configurations, tokenizers, and files that are none."""

import json
import os
from pathlib import Path
from typing import Any

from tests.support.files.checkpoint_fixtures import TINY
from tests.support.hostile.cases import CORPUS, Damage, case, overwrite


def index(weight_map: Any, file: str = "flax_model.msgpack", raw: bytes | None = None) -> Damage:
    def damage(folder: Path) -> None:
        text = json.dumps({"weight_map": weight_map}).encode() if raw is None else raw
        (folder / f"{file}.index.json").write_bytes(text)

    return damage


for name, weight_map in {
    "to a parent folder": {"a": "../flax_model.msgpack"},
    "to the root": {"a": "/etc/passwd"},
    "to a Windows path": {"a": "..\\flax_model.msgpack"},
    "to a drive": {"a": "C:flax_model.msgpack"},
    "to a folder": {"a": "."},
    "to a number": {"a": 3},
    "to nothing": {"a": ""},
    "to a NUL": {"a": "flax_model.msgpack\0.x"},
    "to a missing file": {"a": "flax_model-00001-of-00001.msgpack"},
    "of other tensors": {"a": "flax_model.msgpack"},
    "of no tensors": {},
    "that is a list": ["flax_model.msgpack"],
}.items():
    CORPUS[f"index: {name}"] = ("flax-msgpack", index(weight_map))
for name, raw in {
    "no JSON": b"{",
    "JSON 100,000 deep": b"[" * 100_000,
    "a key twice": b'{"weight_map": {"a": "b"}, "weight_map": {"a": "c"}}',
    "no text": b"\xff\xfe\x00",
    "of numbers without end": b'{"weight_map": {"a": ' + b"9" * 100_000 + b"}}",
}.items():
    CORPUS[f"index: {name}"] = ("tf-h5", index({}, "tf_model.h5", raw))
for name, changes in {
    "10**9 layers": {"num_hidden_layers": 10**9},
    "10**12 columns": {"hidden_size": 10**12, "ffn_dim": 10**12},
    "10**12 tokens": {"vocab_size": 10**12},
    "a layer less": {"num_hidden_layers": 1},
    "a key misspelt": {"hiden_size": 8},
    "NaN": {"dropout": float("nan")},
}.items():
    data = json.dumps({**TINY.to_dict(), **changes}).encode()
    for kind in ("safetensors", "flax-msgpack"):
        CORPUS[f"config of {kind}: {name}"] = (kind, overwrite("config.json", data))
for name, data in {"depth": b"[" * 100_000, "nothing": b"", "no text": b"\xff"}.items():
    CORPUS[f"config: {name}"] = ("safetensors", overwrite("config.json", data))


@case("tokenizer: a vocabulary of another kind", "safetensors")
def _(folder: Path) -> None:
    (folder / "vocab.json").write_text('{"a": {"b": 1}}')
    (folder / "merges.txt").write_text("a b\n")


@case("tokenizer: a vocabulary 100,000 deep", "safetensors")
def _(folder: Path) -> None:
    (folder / "vocab.json").write_text("[" * 100_000)
    (folder / "merges.txt").write_text("a b\n")


@case("a folder for a file")
def _(folder: Path) -> None:
    TINY.save_pretrained(folder)
    (folder / "flax_model.msgpack").mkdir()


@case("a link to nowhere")
def _(folder: Path) -> None:
    TINY.save_pretrained(folder)
    (folder / "tf_model.h5").symlink_to("nowhere")


@case("a link to itself")
def _(folder: Path) -> None:
    TINY.save_pretrained(folder)
    (folder / "flax_model.msgpack").symlink_to("flax_model.msgpack")


@case("a pipe")
def _(folder: Path) -> None:
    TINY.save_pretrained(folder)
    os.mkfifo(folder / "flax_model.msgpack")


@case("a device")
def _(folder: Path) -> None:
    TINY.save_pretrained(folder)
    (folder / "model.weights.h5").symlink_to("/dev/zero")


@case("a pointer of Git LFS")
def _(folder: Path) -> None:
    TINY.save_pretrained(folder)
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / "flax_model.msgpack").write_text(pointer)
