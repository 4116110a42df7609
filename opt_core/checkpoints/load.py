"""Checkpoints in Hugging Face's layout: found, compared with a configuration, then streamed.

Load = plan, check, stream: names and shapes are read from file headers and compared with the
parameter specification first, one error lists everything that does not fit, and only then do
tensors move, one at a time.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from opt_core.checkpoints.missing_weights import no_weights
from opt_core.checkpoints.quantized.reading import dequantized
from opt_core.checkpoints.report import printable
from opt_core.checkpoints.safetensors_format import read_safetensors
from opt_core.checkpoints.save import save_checkpoint
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.checkpoints.torch_format import is_torch_file, read_torch_file
from opt_core.checkpoints.wrappers import unwrap_names
from opt_core.errors import CheckpointError, MissingFileError
from opt_core.json_files import parse_json_object

__all__ = ["Checkpoint", "open_checkpoint", "save_checkpoint"]

Format = Literal[
    "safetensors", "torch-bin", "tf-h5", "flax-msgpack", "metaseq", "keras-hub", "deepspeed",
    "torch-distributed", "numpy",
]  # fmt: skip
_SUFFIXES = (".safetensors", ".bin")
# An index comes before the single file of its format: hub repositories keep stale single files.
_WEIGHT_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
_INDEX = ".index.json"
_MAX_INDEX = 1 << 26
_MANY_LAYERS = 1000  # listing what they lack would take long
_COMPARED_BYTES = 1 << 26
_EMBEDDING = "model.decoder.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_TIED = {_EMBEDDING, _LM_HEAD}
_PAIR = ("embed_tokens.weight", _LM_HEAD)  # under any wrapper


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of one model, headers read.

    Attributes:
        folder: Where they are.
        files: The weight files.
        tensors: Canonical name -> where the tensor lies.
        format: What they are written in; the models themselves load the first two.
        notes: What was not taken as it is, one line each.
        aside: Tensors of a value head, which are no part of the model, by their names.
        quantization: Whose way of quantising it is, such as "gptq"; None: it is not quantised.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor]
    format: Format
    notes: tuple[str, ...] = ()
    aside: Mapping[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])
    quantization: str | None = None


def has_own_format(path: Path) -> bool:
    """Whether a folder holds, or a file is, safetensors or PyTorch's weights."""
    if path.is_dir():
        return any(os.path.lexists(path / name) for name in _WEIGHT_FILES)
    return path.suffix in _SUFFIXES or _plain_index(path.name) in _WEIGHT_FILES


def open_checkpoint(path: Path, prefix: str = "") -> Checkpoint:
    """Finds a model's weight files and reads their headers.

    Args:
        path: Folder, a single .safetensors or .bin file, or the index of several. In a folder,
            safetensors files are preferred to torch's, and an index to a single file of the same
            format.
        prefix: Takes only the tensors whose names begin so, without it: a part of a larger model.

    Raises:
        CheckpointError: There are no weights, or a file is missing, damaged, or at odds with its
            index.
    """
    if not os.path.lexists(path):
        raise MissingFileError(f"{path}: no such file or folder")
    if path.is_dir():
        name = next((name for name in _WEIGHT_FILES if os.path.lexists(path / name)), None)
        if name is None:
            raise no_weights(path, _WEIGHT_FILES)
        path /= name
    if path.suffix == ".json" and _plain_index(path.name) in _WEIGHT_FILES:
        shards: Mapping[str, set[str] | None] = read_index(path)
    elif path.suffix in _SUFFIXES:
        shards = {path.name: None}
    else:
        raise CheckpointError(
            f"{path}: expected a folder, a .safetensors or a .bin file; `opt-lm convert` reads "
            "other formats"
        )
    kind = "torch-bin" if is_torch_file(path.parent / next(iter(shards))) else "safetensors"
    checkpoint = read_files(path.parent, shards, kind, read_native)
    return _dequantized(
        unwrapped(_part(checkpoint, prefix.rstrip(".") + ".") if prefix else checkpoint)
    )


def _dequantized(checkpoint: Checkpoint) -> Checkpoint:
    """The same weights in floating point, where another library, or we, quantised them."""
    opened = dequantized(checkpoint.folder, checkpoint.tensors)
    files = (*checkpoint.files, *opened.files)
    notes = (*checkpoint.notes, *opened.notes)
    return replace(
        checkpoint, files=files, tensors=opened.tensors, notes=notes, quantization=opened.method
    )


def _plain_index(name: str) -> str:
    """The name of an index, without a variant's: that of "model.safetensors.index.fp16.json"."""
    stem, _, rest = name.partition(".index.")
    return stem + _INDEX if rest else name


def read_native(path: Path) -> Mapping[str, LazyTensor]:
    """Reads the header of a safetensors or torch file, whichever it is and however it is called."""
    return read_torch_file(path) if is_torch_file(path) else read_safetensors(path)


def _part(checkpoint: Checkpoint, prefix: str) -> Checkpoint:
    """The tensors of one part of a model, under the names they have in it."""
    tensors = {
        name.removeprefix(prefix): tensor
        for name, tensor in checkpoint.tensors.items()
        if name.startswith(prefix)
    }
    if not tensors:
        raise CheckpointError(f"{checkpoint.folder}: no tensor's name begins with {prefix!r}")
    return replace(checkpoint, tensors=tensors)


def unwrapped(checkpoint: Checkpoint) -> Checkpoint:
    """The same tensors under the names they have without what a trainer put around the model.

    Raises:
        CheckpointError: Two tensors have the same name then.
    """
    names, wrappers, aside = unwrap_names(checkpoint.tensors)
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        _add(tensors, names[name], tensor)
    notes = list(checkpoint.notes)
    if wrappers:
        parts = ", ".join(printable(f"{part}.") for part in wrappers)
        notes.append(f"{checkpoint.folder}: names of weights are read without {parts} in them")
    kept = {**checkpoint.aside, **{name: checkpoint.tensors[name] for name in aside}}
    return replace(checkpoint, tensors=tensors, notes=tuple(notes), aside=kept)


def _add(tensors: dict[str, LazyTensor], canonical: str | None, tensor: LazyTensor) -> None:
    if canonical is None:
        return
    if canonical in tensors:
        raise CheckpointError(
            f"{tensor.file}: {printable(tensor.name)} and {printable(tensors[canonical].name)} "
            f"are both {printable(canonical)}; remove one of them"
        )
    tensors[canonical] = tensor


def read_index(path: Path) -> dict[str, set[str]]:
    """Reads the index of a sharded checkpoint: each shard and the tensors it should hold.

    Keras' names groups of tensors, and a group may be spread over several shards.

    Raises:
        CheckpointError: It is damaged, or names a file that is missing or not beside it.
    """
    try:
        if path.stat().st_size > _MAX_INDEX:
            raise CheckpointError(f"{path}: expected at most {_MAX_INDEX} bytes")
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    weight_map = parse_json_object(text, path, CheckpointError, unique_keys=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: expected a weight_map from tensors to file names")
    shards: dict[str, set[str]] = {}
    for name, value in cast(dict[str, object], weight_map).items():
        for shard in cast(list[object], value) if isinstance(value, list) else [value]:
            if not isinstance(shard, str) or not is_plain_name(shard):
                raise CheckpointError(
                    f"{path}: {name!r}: expected the name of a file beside the index, "
                    f"received {shard!r}"
                )
            shards.setdefault(shard, set()).add(name)
    missing = [shard for shard in shards if not (path.parent / shard).exists()]
    if missing:
        raise CheckpointError(f"{path}: missing shards: {shorten(missing)}; download them again")
    return shards


def is_plain_name(name: str) -> bool:
    """Whether a name in a file means a file beside it, and no other place."""
    # A link under a plain name is fine: the hub's cache is made of links.
    return name not in ("", ".", "..") and not set(name) & set("/\\:\0") and name.isprintable()


def canonical_name(name: str) -> str | None:
    """The name in `OPTForCausalLM`, or None for bookkeeping that is no weight."""
    if name.startswith("decoder."):
        name = f"model.{name}"
    return None if name == "model.decoder.version" else name


def read_files(
    folder: Path,
    shards: Mapping[str, set[str] | None],
    kind: Format,
    read: Callable[[Path], Mapping[str, LazyTensor]],
    rename: Callable[[str], str | None] = canonical_name,
) -> Checkpoint:
    """Reads the headers of weight files and puts them together under canonical names.

    Args:
        folder: Where they are.
        shards: Name of each file and the tensors it should hold; None if nobody says.
        kind: Their format.
        read: Reads the headers of one file.
        rename: Turns a name in an index or file into a canonical one.

    Raises:
        CheckpointError: A file is damaged, at odds with its index, or repeats a tensor.
    """
    tensors: dict[str, LazyTensor] = {}
    for shard, listed in shards.items():
        stored = read(folder / shard)
        expected, found = {rename(name) for name in listed or ()}, {rename(name) for name in stored}
        # Of a tied pair an index may list both names where the file has one, or the other way.
        differ = {name for name in expected ^ found if not (name or "").endswith(_PAIR)}
        if listed is not None and differ:
            absent = sorted(name for name in listed if rename(name) not in found)
            extra = sorted(name for name in stored if rename(name) not in expected)
            raise CheckpointError(
                f"{folder / shard}: not what the index lists: {len(absent)} tensors absent"
                f"{_named(absent)}, {len(extra)} unlisted{_named(extra)}"
            )
        for name, tensor in stored.items():
            _add(tensors, rename(name), tensor)
    if not tensors:
        raise CheckpointError(f"{folder}: the weight files hold no tensors")
    return Checkpoint(folder, tuple(folder / shard for shard in shards), tensors, kind)


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """Names out of files for a message, the first of many."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name) for name in names[:limit]) + more


def _named(names: list[str]) -> str:
    return f" ({shorten(names)})" if names else ""
