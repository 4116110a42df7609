"""Checkpoints in Hugging Face's layout: found, compared with a configuration, then streamed.

Load = plan, check, stream: names and shapes are read from file headers and compared with the
parameter specification first, one error lists everything that does not fit, and only then do
tensors move, one at a time.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

from opt_core.checkpoints.missing_weights import no_weights
from opt_core.checkpoints.quantized.reading import dequantized
from opt_core.checkpoints.quantized.tensor import numbers_of
from opt_core.checkpoints.report import describe_mismatch, printable
from opt_core.checkpoints.safetensors_format import read_safetensors
from opt_core.checkpoints.save import save_checkpoint
from opt_core.checkpoints.tensors import LazyTensor, cast_array, float_dtype
from opt_core.checkpoints.torch_format import is_torch_file, read_torch_file
from opt_core.checkpoints.wrappers import unwrap_names
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, MismatchError, MissingFileError
from opt_core.json_files import parse_json_object
from opt_core.params import HEAD_PARAMETERS, Head, ParamSpec, param_specs
from opt_core.quantization import scheme_of

__all__ = ["Checkpoint", "LoadPlan", "open_checkpoint", "plan_load", "save_checkpoint"]

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
        quantization: Whose way of quantising it is, such as "gptq"; None: it is not quantised.
    """

    folder: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, LazyTensor]
    format: Format
    notes: tuple[str, ...] = ()
    quantization: str | None = None


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
        self,
        dtype: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        quantize: str | None = None,
    ) -> Iterator[tuple[ParamSpec, Any]]:
        """Reads the tensors one at a time, in the order they lie in the files.

        Args:
            dtype: Type to convert to ("float32", "bfloat16", ...), or None for the stored one. A
                tensor that has it already is a view of the file (see `StoredTensor.read`).
            progress: Called after each tensor with the bytes read so far and in all.
            quantize: The scheme to keep weights by (`opt_core.quantization.scheme_of`), or None.

        Yields:
            Each parameter with its array, in the canonical (torch) layout, or its
            `QuantizedTensor`.

        Raises:
            CheckpointError: A value is out of the new type's range, or cannot be quantised.
        """
        target = None if dtype is None else float_dtype(dtype)
        total, done = sum(stored.nbytes for _, stored in self.entries), 0
        for spec, stored in sorted(self.entries, key=lambda e: (str(e[1].file), e[1].offset)):
            if scheme := scheme_of(spec, quantize):
                yield spec, numbers_of(spec.name, stored, scheme)
            else:
                yield spec, cast_array(spec.name, stored.read(), target or stored.dtype)
            done += stored.nbytes
            if progress is not None:
                progress(done, total)


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
    if aside:
        notes.append(f"{checkpoint.folder}: a value head is left aside{_named(list(aside))}")
    return replace(checkpoint, tensors=tensors, notes=tuple(notes))


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
        raise CheckpointError(f"{path}: missing shards: {_shorten(missing)}; download them again")
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
    it differs it is honoured, by a configuration that does not tie them. If a tied head is there
    alone, it is the embedding too.

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
    stored = dict(checkpoint.tensors)
    if config.tie_word_embeddings and _EMBEDDING not in stored and _LM_HEAD in stored:
        stored[_EMBEDDING] = stored.pop(_LM_HEAD)  # as safetensors' save_model keeps a tied pair
    tensors = {name: tensor for name, tensor in stored.items() if _belongs(name, head)}
    if head == "causal_lm" and config.tie_word_embeddings and {*tensors} >= _TIED:
        if _equal(tensors[_LM_HEAD], tensors[_EMBEDDING]):
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
    aside = [name for name in stored if not _belongs(name, head)]
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
