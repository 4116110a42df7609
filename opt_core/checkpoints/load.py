"""Checkpoints in Hugging Face's layout: found, compared with a configuration, then streamed.

Load = plan, check, stream: names and shapes are read from file headers and compared with the
parameter specification first, one error lists everything that does not fit, and only then do
tensors move, one at a time.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.report import describe_mismatch, printable
from opt_core.checkpoints.safetensors_format import read_safetensors
from opt_core.checkpoints.save import save_checkpoint
from opt_core.checkpoints.tensors import LazyTensor, cast_array, float_dtype
from opt_core.checkpoints.torch_format import read_torch_file
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, MismatchError, MissingFileError
from opt_core.json_files import parse_json_object
from opt_core.params import HEAD_PARAMETERS, Head, ParamSpec, param_specs

__all__ = ["Checkpoint", "LoadPlan", "open_checkpoint", "plan_load", "save_checkpoint"]

Format = Literal["safetensors", "torch-bin", "tf-h5", "flax-msgpack", "metaseq", "keras-hub"]
_Native = Literal["safetensors", "torch-bin"]
_READERS: dict[_Native, Callable[[Path], Mapping[str, LazyTensor]]] = {
    "safetensors": read_safetensors,
    "torch-bin": read_torch_file,
}
_SUFFIXES: dict[str, _Native] = {".safetensors": "safetensors", ".bin": "torch-bin"}
# An index comes before the single file of its format: hub repositories keep stale single files.
_WEIGHT_FILES: dict[str, _Native] = {
    "model.safetensors.index.json": "safetensors",
    "model.safetensors": "safetensors",
    "pytorch_model.bin.index.json": "torch-bin",
    "pytorch_model.bin": "torch-bin",
}
_INDEX = ".index.json"
_OTHER_FORMATS = ("tf_model*.h5*", "flax_model*.msgpack*", "*.pt", "*.pth", "*.weights.h5")
_MAX_INDEX = 1 << 26
_MANY_LAYERS = 1000  # listing what they lack would take long
_COMPARED_BYTES = 1 << 26
_EMBEDDING = "model.decoder.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Checkpoint:
    """The weight files of one model, headers read.

    Attributes:
        folder: Where they are.
        files: The weight files.
        tensors: Canonical name -> where the tensor lies.
        format: What they are written in; the models themselves load the first two.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor]
    format: Format


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint that fits a model, ready to be loaded.

    Attributes:
        config: The configuration to build; untied if the checkpoint's head differs from its
            embedding.
        entries: Each parameter and where it lies, in the order of the modules.
        fresh: Parameters of a head the checkpoint does not have, and those of another shape there,
            for the caller to initialise.
        misshapen: Of the latter, name -> shape in the checkpoint.
        aside: Names of the checkpoint's tensors that are another head's.
    """

    config: OPTConfig
    entries: list[tuple[ParamSpec, LazyTensor]]
    fresh: list[ParamSpec]
    misshapen: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    aside: list[str] = field(default_factory=list[str])

    def stream(
        self, dtype: str | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Iterator[tuple[ParamSpec, NDArray[Any]]]:
        """Reads the tensors one at a time, in the order they lie in the files.

        Args:
            dtype: Type to convert to ("float32", "bfloat16", ...), or None for the stored one. A
                tensor that has it already is a view of the file (see `StoredTensor.read`).
            progress: Called after each tensor with the bytes read so far and in all.

        Yields:
            Each parameter with its array, in the canonical (torch) layout.

        Raises:
            CheckpointError: A value is out of the new type's range.
        """
        target = None if dtype is None else float_dtype(dtype)
        total, done = sum(stored.nbytes for _, stored in self.entries), 0
        for spec, stored in sorted(self.entries, key=lambda e: (str(e[1].file), e[1].offset)):
            yield spec, cast_array(spec.name, stored.read(), target or stored.dtype)
            done += stored.nbytes
            if progress is not None:
                progress(done, total)


def has_own_format(path: Path) -> bool:
    """Whether a folder holds, or a file is, safetensors or PyTorch's weights."""
    if path.is_dir():
        return any(os.path.lexists(path / name) for name in _WEIGHT_FILES)
    return path.suffix in _SUFFIXES or _plain_index(path.name) in _WEIGHT_FILES


def open_checkpoint(path: Path) -> Checkpoint:
    """Finds a model's weight files and reads their headers.

    Args:
        path: Folder, a single .safetensors or .bin file, or the index of several. In a folder,
            safetensors files are preferred to torch's, and an index to a single file of the same
            format.

    Raises:
        CheckpointError: There are no weights, or a file is missing, damaged, or at odds with its
            index.
    """
    if not os.path.lexists(path):
        raise MissingFileError(f"{path}: no such file or folder")
    if path.suffix == ".json" and (plain := _plain_index(path.name)) in _WEIGHT_FILES:
        kind = _WEIGHT_FILES[plain]
        return read_files(path.parent, read_index(path), kind, _READERS[kind])
    if not path.is_dir():
        if path.suffix not in _SUFFIXES:
            raise CheckpointError(
                f"{path}: expected a folder, a .safetensors or a .bin file; `opt-lm convert` reads "
                "other formats"
            )
        kind = _SUFFIXES[path.suffix]
        return read_files(path.parent, {path.name: None}, kind, _READERS[kind])
    for name, kind in _WEIGHT_FILES.items():
        if os.path.lexists(path / name):
            shards = read_index(path / name) if name.endswith(_INDEX) else {name: None}
            return read_files(path, shards, kind, _READERS[kind])
    if shard := next((p.name for p in path.glob("*-of-*") if p.suffix in _SUFFIXES), None):
        raise CheckpointError(f"{path}: {shard} is there, but the index of its shards is missing")
    found = sorted({p.name for pattern in _OTHER_FORMATS for p in path.glob(pattern)})
    other = f"; found {', '.join(found[:8])}: `opt-lm convert` reads these" if found else ""
    raise MissingFileError(f"{path}: no weights; expected one of {', '.join(_WEIGHT_FILES)}{other}")


def _plain_index(name: str) -> str:
    """The name of an index, without a variant's: that of "model.safetensors.index.fp16.json"."""
    stem, _, rest = name.partition(".index.")
    return stem + _INDEX if rest else name


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
            if not isinstance(shard, str) or not _is_plain_name(shard):
                raise CheckpointError(
                    f"{path}: {name!r}: expected the name of a file beside the index, "
                    f"received {shard!r}"
                )
            shards.setdefault(shard, set()).add(name)
    missing = [shard for shard in shards if not (path.parent / shard).exists()]
    if missing:
        raise CheckpointError(f"{path}: missing shards: {_shorten(missing)}; download them again")
    return shards


def _is_plain_name(name: str) -> bool:
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
        if listed is not None and expected != found:
            absent = sorted(name for name in listed if rename(name) not in found)
            extra = sorted(name for name in stored if rename(name) not in expected)
            raise CheckpointError(
                f"{folder / shard}: not what the index lists: {len(absent)} tensors absent"
                f"{_named(absent)}, {len(extra)} unlisted{_named(extra)}"
            )
        for name, tensor in stored.items():
            canonical = rename(name)
            if canonical is not None and canonical in tensors:
                raise CheckpointError(
                    f"{folder / shard}: {printable(name)} and {printable(tensors[canonical].name)} "
                    f"are both {printable(canonical)}; remove one of them"
                )
            if canonical is not None:
                tensors[canonical] = tensor
    if not tensors:
        raise CheckpointError(f"{folder}: the weight files hold no tensors")
    return Checkpoint(folder, tuple(folder / shard for shard in shards), tensors, kind)


def _shorten(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(printable(name) for name in names[:limit]) + more


def _named(names: list[str]) -> str:
    return f" ({_shorten(names)})" if names else ""


def plan_load(
    checkpoint: Checkpoint, config: OPTConfig, head: Head, skip_misshapen: bool = False
) -> LoadPlan:
    """Compares a checkpoint with a model, by names and shapes, and says how to load it.

    Tensors of another head are left out. A classification or question-answering head that is absent
    as a whole is listed in `fresh`. A language-model head that equals the embedding is left out; if
    it differs it is honoured, by a configuration that does not tie them.

    Args:
        checkpoint: From `open_checkpoint`.
        config: The model's configuration.
        head: The head that is to sit on the decoder.
        skip_misshapen: Whether tensors of another shape are left out, their parameters `fresh`.

    Raises:
        CheckpointError: Tensors are missing, unexpected, or of another shape; all are listed.
    """
    if config.num_hidden_layers > max(_MANY_LAYERS, len(checkpoint.tensors)):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says {config.num_hidden_layers} layers, the weights "
            f"are {len(checkpoint.tensors)} tensors"
        )
    tensors = {name: t for name, t in checkpoint.tensors.items() if _belongs(name, head)}
    if head == "causal_lm" and config.tie_word_embeddings and _LM_HEAD in tensors:
        if _EMBEDDING not in tensors or _equal(tensors[_LM_HEAD], tensors[_EMBEDDING]):
            del tensors[_LM_HEAD]
        else:
            config = config.replace(tie_word_embeddings=False)
    specs = param_specs(config, head)
    fresh: list[ParamSpec] = []
    if head in ("sequence_classification", "question_answering"):
        fresh = [spec for spec in specs if spec.name in HEAD_PARAMETERS[head]]
        if any(spec.name in tensors for spec in fresh):
            fresh = []
    misshapen: dict[str, tuple[int, ...]] = {}
    if skip_misshapen:
        given = [spec for spec in specs if spec.name in tensors]
        wrong = [spec for spec in given if spec.shape != tensors[spec.name].shape]
        misshapen = {spec.name: tensors.pop(spec.name).shape for spec in wrong}
        fresh = [*fresh, *wrong]
    specs = [spec for spec in specs if spec not in fresh]
    if mismatch := describe_mismatch(checkpoint.folder, config, specs, tensors):
        raise MismatchError(mismatch)
    entries = [(spec, tensors[spec.name]) for spec in specs]
    aside = [name for name in checkpoint.tensors if not _belongs(name, head)]
    return LoadPlan(config, entries, fresh, misshapen, aside)


def _belongs(name: str, head: Head) -> bool:
    others = {n for h, names in HEAD_PARAMETERS.items() if h != head for n in names}
    return name not in others


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    if a.is_same_as(b):
        return True
    if a.shape != b.shape or not a.shape or not a.nbytes:
        return False
    rows = max(1, _COMPARED_BYTES // a.rows(0, 1).nbytes)
    return all(
        np.array_equal(a.rows(i, i + rows).read(), b.rows(i, i + rows).read())
        for i in range(0, a.shape[0], rows)
    )
