"""Broken and hostile checkpoints, each made from a sound one by a function of its folder."""

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.core.checkpoint_fixtures import (
    EMBEDDING,
    TINY,
    Cut,
    number,
    pickled,
    random_weights,
    state_dict,
    storage,
    tensor,
    text,
    write_torch_file,
    write_torch_zip,
)

SECONDS = 5
MEMORY = 1 << 30

Damage = Callable[[Path], Any]
FILES = {
    "safetensors": "model.safetensors",
    "torch-bin": "pytorch_model.bin",
    "tf-h5": "tf_model.h5",
    "flax-msgpack": "flax_model.msgpack",
    "metaseq": "reshard.pt",
    "keras-hub": "model.weights.h5",
}
CORPUS: dict[str, tuple[str | None, Damage]] = {}
"""Name -> the format of the sound checkpoint to start from (None: an empty folder), the damage."""


def used() -> float:
    """Seconds of processor, children's too: a wait for the disk is no loop."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def case(name: str, start: str | None = None) -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        assert name not in CORPUS
        CORPUS[name] = (start, damage)
        return damage

    return add


def cut(file: str, keep: float | int) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        size = int(keep * len(data)) if isinstance(keep, float) else keep
        (folder / file).write_bytes(data[: size if size >= 0 else len(data) + size])

    return damage


for kind, file in FILES.items():
    for keep in (0, 4, 9, 40, 0.1, 0.5, 0.9, -30, -1):
        if kind != "keras-hub":  # HDF5 like tf-h5
            CORPUS[f"{kind} cut to {keep}"] = (kind, cut(file, keep))


def replace(file: str, old: bytes, new: bytes) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        assert old in data
        (folder / file).write_bytes(data.replace(old, new, 1))

    return damage


def overwrite(file: str, data: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(data)


# MessagePack.
FLAX = "flax_model.msgpack"
NDARRAY = b"\x93\x91\x02\xa7float32\xc4\x08" + b"\0" * 8


def extension(body: bytes, code: int = 1) -> bytes:
    return b"\xc7" + bytes([len(body), code]) + body


def named(value: bytes) -> bytes:
    return b"\x81\xa1a" + value


def array(old: bytes = b"", new: bytes = b"") -> bytes:
    """A sound array, or one of which a part is another."""
    assert old in NDARRAY
    return extension(NDARRAY.replace(old, new, 1) if old else NDARRAY)


def chunked(shape: bytes, chunk: bytes) -> bytes:
    flag = b"\x83\xb9__msgpack_chunked_array__\xc3"
    return flag + b"\xa5shape\x81\xa10" + shape + b"\xa6chunks\x81\xa10" + chunk


for name, data in {
    "an empty map": b"\x80",
    "a number": b"\x07",
    "a string": b"\xa3abc",
    "a list": b"\x91\x01",
    "bytes": b"\xc4\x01a",
    "nothing but nil": b"\xc0",
    "the code no kind has": b"\xc1",
    "2**32 - 1 entries": b"\xdf\xff\xff\xff\xff",
    "2**32 - 1 items": b"\xdd\xff\xff\xff\xff" + b"\x00" * 64,
    "a billion small items": b"\x81\xa1a\xdd\x3b\x9a\xca\x00" + b"\x90" * 150_000,
    "maps 100,000 deep": b"\x81\xa1a" * 100_000 + b"\xc0",
    "lists 100,000 deep": b"\x91" * 100_000,
    "a name of 4 GiB": b"\x81\xdb\xff\xff\xff\xff" + b"a" * 100,
    "a name of 100 kB": b"\x81\xdb\x00\x01\x86\xa0" + b"a" * 100_000 + b"\xc0",
    "a name that is no text": b"\x81\xa2\xff\xfe\xc0",
    "a name that is a number": b"\x81\x01\xc0",
    "a name that is a list": b"\x81\x91\x01\xc0",
    "a name twice": b"\x82" + (b"\xa1a" + array()) * 2,
    "bytes after the end": b"\x80\x80",
    "an array of 4 GiB": named(b"\xc9\xff\xff\xff\xff\x01" + NDARRAY),
    "a native complex": named(extension(b"\x92\x01\x02", 2)),
    "a numpy scalar": named(extension(NDARRAY, 3)),
    "an extension of no type": named(b"\xd4\x7f\x00"),
    "an array of nothing": named(extension(b"")),
    "an array of objects": named(array(b"\xa7float32", b"\xa6object")),
    "an array of bytes as text": named(array(b"\xc4\x08", b"\xd9\x08")),
    "an array with a shape of text": named(array(b"\x91\x02", b"\x91\xa12")),
    "an array with a negative shape": named(array(b"\x91\x02", b"\x91\xfe")),
    "an array with a shape of true": named(array(b"\x91\x02", b"\x92\x02\xc3")),
    "an array of another size": named(array(b"\x91\x02", b"\x91\x03")),
    "an array with a shape of 2**64": named(array(b"\x91\x02", b"\x91\xcf" + b"\xff" * 8)),
    "an array with four parts": named(array(b"\x93", b"\x94\x01")),
    "an array and more": named(extension(NDARRAY + b"\x01")),
    "an array within an array": named(array(b"\x91\x02", b"\x91" + array())),
    "a leaf that is a string": named(b"\xa1b"),
    "a leaf that is a number": named(b"\xcb" + b"\0" * 8),
    "a leaf that is a list": named(b"\x91" + array()),
    "chunks of nothing": named(b"\x81\xb9__msgpack_chunked_array__\xc3"),
    "chunks of a false shape": named(chunked(b"\x09", array())),
    "chunks of a negative shape": named(chunked(b"\xfe", array())),
    "chunks that are numbers": named(chunked(b"\x02", b"\x02")),
    "chunks of two dimensions": named(chunked(b"\x02", array(b"\x91\x02", b"\x92\x01\x02"))),
    "a control character in a name": b"\x81\xa2\x1b[" + array(),
}.items():
    CORPUS[f"flax: {name}"] = ("flax-msgpack", overwrite(FLAX, data))
CORPUS["flax: another array"] = ("flax-msgpack", replace(FLAX, b"fc1", b"fc9"))
CORPUS["flax: another type"] = ("flax-msgpack", replace(FLAX, b"float32", b"uint256"))


# HDF5.
def h5(edit: Callable[[h5py.File], Any], file: str = "tf_model.h5") -> Damage:
    def damage(folder: Path) -> None:
        with h5py.File(folder / file, "a") as opened:
            edit(opened)

    return damage


NAME = "model/tfopt_for_causal_lm/model/decoder/layers.0/fc1/bias:0"


def instead(**kwargs: Any) -> Callable[[h5py.File], Any]:
    def edit(file: h5py.File) -> None:
        del file[NAME]
        file.create_dataset(NAME, **kwargs)

    return edit


def link(target: Any) -> Callable[[h5py.File], Any]:
    def edit(file: h5py.File) -> None:
        del file[NAME]
        file[NAME] = target

    return edit


def virtual(file: h5py.File) -> None:
    del file[NAME]
    layout = h5py.VirtualLayout(shape=(12,), dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=(12,))
    file.create_virtual_dataset(NAME, layout)


def deep(file: h5py.File) -> None:
    group = file
    for _ in range(200):
        group = group.create_group("g")


def loop(file: h5py.File) -> None:
    file["model/again"] = file["model"]


for name, edit in {
    "a soft link": link(h5py.SoftLink("/model")),
    "a soft link to nowhere": link(h5py.SoftLink("/nowhere")),
    "a link to another file": link(h5py.ExternalLink("/etc/passwd", "/x")),
    "data in another file": instead(shape=(12,), dtype="f4", external=[("/etc/passwd", 0, 48)]),
    "a virtual dataset": virtual,
    "a compressed dataset": instead(data=np.zeros(12, "f4"), compression="gzip"),
    "a dataset in chunks": instead(data=np.zeros(12, "f4"), chunks=(4,)),
    "2**60 elements that are nowhere": instead(shape=(2**60,), dtype="f4", chunks=(1024,)),
    "2**60 elements never written": instead(shape=(2**60,), dtype="f4"),
    "a dataset never written": instead(shape=(12,), dtype="f4"),
    "big-endian numbers": instead(data=np.zeros(12, ">f4")),
    "integers": instead(data=np.zeros(12, "i4")),
    "complex numbers": instead(data=np.zeros(12, "c8")),
    "a record": instead(data=np.zeros(12, [("a", "f4"), ("b", "f4")])),
    "strings": instead(data=np.array([b"abc"] * 12)),
    "a scalar": instead(data=np.float32(1)),
    "nothing at all": instead(data=h5py.Empty("f4")),
    "another shape": instead(data=np.zeros((3, 4), "f4")),
    "groups 200 deep": deep,
    "a group inside itself": loop,
    "12,000 groups": lambda file: [file.create_group(f"x/{i}") for i in range(12_000)],
    "a layer too many": lambda file: file.copy("model", "model/tfopt_for_causal_lm/model2"),
    "no layer": lambda file: file.pop("model"),
    "a name of control characters": lambda file: file.create_dataset("\x1b[2J", data=[1.0]),
}.items():
    CORPUS[f"h5: {name}"] = ("tf-h5", h5(edit))
CORPUS["h5: text"] = ("tf-h5", overwrite("tf_model.h5", b"<!DOCTYPE html>"))
CORPUS["h5: a magic number"] = ("tf-h5", overwrite("tf_model.h5", b"\x89HDF\r\n\x1a\n"))


@case("h5: something before its contents", "tf-h5")
def _(folder: Path) -> None:
    data = (folder / "tf_model.h5").read_bytes()
    with h5py.File(folder / "x", "w", userblock_size=512):
        pass
    (folder / "x").replace(folder / "tf_model.h5")
    assert data


def keras(edit: Callable[[h5py.File], Any]) -> Damage:
    return h5(edit, "model.weights.h5")


LAYER = "layers/transformer_decoder"
KERAS_FIELDS = (
    *("vocabulary_size", "num_layers", "num_heads", "hidden_dim", "intermediate_dim"),
    "max_sequence_length",
)
for name, edit in {
    "a layer of a huge number": lambda f: f.copy(LAYER, f"{LAYER}_{'9' * 40}"),
    "a kernel of one dimension": lambda f: [
        f.pop(f"{LAYER}/_feedforward_intermediate_dense/vars/0"),
        f.create_dataset(f"{LAYER}/_feedforward_intermediate_dense/vars/0", data=[1.0]),
    ],
    "a kernel of four dimensions": lambda f: [
        f.pop(f"{LAYER}/_self_attention_layer/query_dense/vars/0"),
        f.create_dataset(f"{LAYER}/_self_attention_layer/query_dense/vars/0", data=[[[[1.0]]]]),
    ],
    "a table of one dimension": lambda f: [
        f.pop("layers/token_and_position_embedding/position_embedding/vars/0"),
        f.create_dataset(
            "layers/token_and_position_embedding/position_embedding/vars/0", data=[1.0]
        ),
    ],
    "rows of another width": lambda f: [
        f.pop("opt_lm/position_rows"),
        f.create_dataset("opt_lm/position_rows", data=[[1.0]]),
    ],
    "a tensor twice": lambda f: f.copy(LAYER, "layers/opt_backbone/layers/transformer_decoder"),
    "another model": lambda f: f.move(LAYER, "layers/bert"),
}.items():
    CORPUS[f"KerasHub: {name}"] = ("keras-hub", keras(edit))
for name, values in {
    "another class": {"class_name": "BertBackbone", "config": {}},
    "no fields": {"class_name": "OPTBackbone", "config": {}},
    "no config": {"class_name": "OPTBackbone"},
    "a task of nothing": {"class_name": "OPTCausalLM", "config": {"backbone": 3}},
    "fields of text": {
        "class_name": "OPTBackbone",
        "config": dict.fromkeys(KERAS_FIELDS, "many"),
    },
}.items():
    data = json.dumps(values).encode()
    CORPUS[f"KerasHub: config of {name}"] = ("keras-hub", overwrite("config.json", data))


# Indices.
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


# Pickles.
class Runs:
    """Pickles as a call."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def metaseq(body: bytes) -> Damage:
    return lambda folder: write_torch_zip(folder / "reshard.pt", body, {"0": bytes(96)})


GOOD = tensor(storage("0", "float32", 24), Cut("0", 0, (4, 6), (6, 1)))
MODEL = b"}" + text("model") + state_dict({"decoder.x.weight": GOOD}) + b"s"
for protocol in range(6):
    for name, call in {
        "os.system": (os.system, "touch RAN"),
        "eval": (eval, "open('RAN', 'w')"),
        "exec": (exec, "open('RAN', 'w')"),
        "open": (open, "RAN", "w"),
    }.items():
        body = pickle.dumps({"model": Runs(*call)}, protocol)
        CORPUS[f"pickle {protocol}: {name}"] = ("metaseq", metaseq(body))
for name, body in {
    "a list of itself": b"]q\x00h\x00a",
    "a dict of itself": b"}q\x00" + text("model") + b"h\x00s",
    "tuples 9,000 deep": b"}" + text("cfg") + b")" + b"\x85" * 9000 + b"s",
    "a key of tuples": b"})" + b"\x85" * 9000 + number(1) + b"s",
    "twice as much fifty times": b"]q\x00" + b"(h\x00h\x00t0h\x00a" * 50,
    "a flood": b"}" * 20_000,
    "a number of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
    "a number of 16 MB": b"\x8b" + struct.pack("<i", 10_000_000) + b"\x7f" * 10_000_000,
    "bytes of 2 GiB": b"B" + struct.pack("<I", 2**31),
    "no tensors": b"}" + text("model") + b"}s",
    "tensors and others": b"}" + text("model") + b"}" + text("a") + number(1) + b"ss",
    "a tensor that reaches out": b"}"
    + text("model")
    + state_dict({"a": tensor(storage("0", "float32", 24), Cut("0", 0, (5, 6), (6, 1)))})
    + b"s",
    "a tensor of one row a million times": b"}"
    + text("model")
    + state_dict({"a": tensor(storage("0", "float32", 24), Cut("0", 0, (2**40, 6), (0, 1)))})
    + b"s",
    "a storage of another file": b"}"
    + text("model")
    + state_dict({"a": GOOD.replace(text("0"), text("../../x"))})
    + b"s",
    "an unknown opcode": b"\xff",
    "an empty stack": b"s",
    "an unknown memo": b"h\x09",
    "an extension": b"\x82\x01",
    "a persistent id of text": b"Pabc\n",
}.items():
    CORPUS[f"metaseq: {name}"] = ("metaseq", metaseq(pickled(body)))
CORPUS["metaseq: another model"] = ("metaseq", metaseq(pickled(MODEL)))


@case("torch: a tensor that is one row, many times", "torch-bin")
def _(folder: Path) -> None:
    weights: dict[str, Any] = dict(random_weights())
    weights["x"] = weights[EMBEDDING]
    weights[EMBEDDING] = Cut("x", 0, (10**9, 8), (0, 1))
    write_torch_file(folder / "pytorch_model.bin", weights)
    TINY.replace(vocab_size=10**9).save_pretrained(folder)


@case("torch: a bomb", "torch-bin")
def _(folder: Path) -> None:
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(1 << 24))


# Configurations and companions.
for name, changes in {
    "10**9 layers": {"num_hidden_layers": 10**9},
    "10**12 columns": {"hidden_size": 10**12, "ffn_dim": 10**12},
    "10**12 tokens": {"vocab_size": 10**12},
    "a layer less": {"num_hidden_layers": 1},
    "a key nobody knows": {"num_experts": 8},
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
