"""Torch's files: pickles that would run something, grow, or reach out of their storage."""

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

from tests.support.files.checkpoint_fixtures import (
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
from tests.support.hostile.cases import CORPUS, Damage, case


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
