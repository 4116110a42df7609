"""Weight files made by hand: torch's zip format without torch, safetensors headers that lie."""

import json
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import LoadPlan, plan_load
from opt_core.config import OPTConfig
from opt_core.params import Head, param_specs

TINY = OPTConfig(
    vocab_size=21,
    hidden_size=8,
    num_attention_heads=2,
    num_hidden_layers=2,
    ffn_dim=12,
    max_position_embeddings=10,
)
PROJECTED = TINY.replace(do_layer_norm_before=False, word_embed_proj_dim=6)
UNTIED = TINY.replace(tie_word_embeddings=False)
BARE = TINY.replace(enable_bias=False, layer_norm_elementwise_affine=False)

EMBEDDING = "model.decoder.embed_tokens.weight"
Weights = dict[str, NDArray[Any]]

STORAGE_NAMES = {
    "float64": "Double",
    "float32": "Float",
    "float16": "Half",
    "bfloat16": "BFloat16",
    "int64": "Long",
    "int32": "Int",
    "int16": "Short",
    "int8": "Char",
    "uint8": "Byte",
    "bool": "Bool",
}
SAFETENSORS_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "I8"}

type_of = {name: np.dtype(name) for name in STORAGE_NAMES if name != "bfloat16"}
type_of["bfloat16"] = np.dtype(ml_dtypes.bfloat16)


def random_weights(
    config: OPTConfig = TINY, head: Head = "causal_lm", dtype: str = "float32", seed: int = 0
) -> dict[str, NDArray[Any]]:
    """One array per parameter, no two alike."""
    rng = np.random.default_rng(seed)
    return {
        spec.name: rng.normal(size=spec.shape).astype(type_of[dtype])
        for spec in param_specs(config, head)
    }


def safetensors_bytes(header: object, data: bytes, length: int | None = None) -> bytes:
    """A safetensors file with any header, as JSON or as it is, and any declared length of it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def write_plain_safetensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """A safetensors file, written here so that a reader is not tested by our own writer alone."""
    header: dict[str, Any] = {}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": SAFETENSORS_NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    data = b"".join(array.tobytes() for array in tensors.values())
    text = json.dumps(header)
    text += " " * (-len(text) % 8)
    path.write_bytes(safetensors_bytes(text.encode(), data))


@dataclass(frozen=True)
class Cut:
    """A tensor as a part of a named storage, in elements."""

    storage: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def name_of(module: str, name: str) -> bytes:
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + sequence(*arguments) + b"R"


ORDERED_DICT = name_of("collections", "OrderedDict") + b")R"
PARAMETER = name_of("torch._utils", "_rebuild_parameter")
TENSOR = name_of("torch._utils", "_rebuild_tensor_v2")


def storage(key: str, kind: str, numel: int) -> bytes:
    named = name_of("torch", f"{STORAGE_NAMES.get(kind, kind)}Storage")
    return sequence(text("storage"), named, text(key), text("cpu"), number(numel)) + b"Q"


def tensor(stored: bytes, cut: Cut) -> bytes:
    """The pickle of one tensor, as `torch.save` writes it."""
    return call(
        TENSOR,
        stored,
        number(cut.offset),
        sequence(*map(number, cut.shape)),
        sequence(*map(number, cut.strides)),
        b"\x89",
        ORDERED_DICT,
    )


def state_dict(entries: Mapping[str, bytes]) -> bytes:
    """The pickle (without its end) of an OrderedDict with the `_metadata` that modules give it."""
    items = b"".join(text(name) + value for name, value in entries.items())
    metadata = b"}" + text("_metadata") + ORDERED_DICT + b"s"
    return ORDERED_DICT + b"(" + items + b"u" + metadata + b"b"


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def write_torch_zip(
    path: Path,
    pickle: bytes,
    storages: Mapping[str, bytes],
    *,
    root: str = "archive",
    byteorder: bytes | None = b"little",
    compression: int = zipfile.ZIP_STORED,
    aligned: bool = True,
) -> None:
    """Torch's archive: data.pkl, byteorder, and one entry per storage on a multiple of 64 bytes."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{root}/data.pkl", pickle)
        if byteorder is not None:
            archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in storages.items():
            info = zipfile.ZipInfo(f"{root}/data/{key}")
            info.compress_type = compression
            assert archive.fp is not None
            start = archive.fp.tell() + 30 + len(info.filename)
            padding = -start % 64
            if aligned and padding:
                padding += 64 * (padding < 4)
                info.extra = struct.pack("<HH", 0x4246, padding - 4) + b"Z" * (padding - 4)
            archive.writestr(info, data)


def write_torch_file(path: Path, tensors: Mapping[str, NDArray[Any] | Cut], **layout: Any) -> None:
    """A `.bin` of arrays; a `Cut` takes its part of the storage that another name stands for."""
    kinds = {name: a.dtype.name for name, a in tensors.items() if not isinstance(a, Cut)}
    keys = {name: str(i) for i, name in enumerate(kinds)}
    entries: dict[str, bytes] = {}
    for name, value in tensors.items():
        if isinstance(value, Cut):
            cut, owner = value, value.storage
        else:
            cut, owner = whole(name, value), name
        array = tensors[owner]
        assert not isinstance(array, Cut)
        entries[name] = tensor(storage(keys[owner], kinds[owner], array.size), cut)
    data = {
        keys[name]: array.tobytes() for name, array in tensors.items() if not isinstance(array, Cut)
    }
    write_torch_zip(path, pickled(state_dict(entries)), data, **layout)


def whole(name: str, array: NDArray[Any]) -> Cut:
    steps = tuple(int(n) // array.itemsize for n in np.ascontiguousarray(array).strides)
    return Cut(name, 0, array.shape, steps if array.ndim else ())


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
