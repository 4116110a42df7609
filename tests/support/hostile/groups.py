"""HDF5 files, TensorFlow's and KerasHub's: links, loops, other layouts, other models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from tests.support.hostile.cases import CORPUS, Damage, case, overwrite


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
    "12,000 groups": lambda file: [h5py.h5g.create(file.id, b"x%d" % i) for i in range(12_000)],
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
