"""A checkpoint from its headers alone: configuration, tensors, sizes, and problems."""

import math
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from conversion.adapters import AdapterSummary, summarize, tensors_of
from conversion.readers import head_of, open_any_checkpoint
from conversion.remote_headers import download_headers
from conversion.sidecar_files import is_keras_hub
from opt_core.adapters.settings import CONFIG_FILE
from opt_core.adapters.tensors import is_adapter, read_adapter
from opt_core.checkpoints.load import Checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.checkpoints.quantized.tensor import PackedTensor
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, OPTError
from opt_core.generation.config import GenerationConfig, as_ids
from opt_core.hub import remote_files, resolve
from opt_core.params import Head
from opt_core.text.tokenizer import OPTTokenizer

_LM_HEAD = "lm_head.weight"
_EMBEDDING = "model.decoder.embed_tokens.weight"
_STALE = {
    "model.safetensors.index.json": "model.safetensors",
    "pytorch_model.bin.index.json": "pytorch_model.bin",
    "tf_model.h5.index.json": "tf_model.h5",
    "flax_model.msgpack.index.json": "flax_model.msgpack",
}
_PARTS = (
    (r"model\.decoder\.embed_tokens\.", "token embedding"),
    (r"model\.decoder\.embed_positions\.", "position embedding"),
    (r"model\.decoder\.project_(in|out)\.", "embedding projections"),
    (r"model\.decoder\.layers\.\d+\.self_attn\.", "layers: attention"),
    (r"model\.decoder\.layers\.\d+\.fc[12]\.", "layers: feed-forward"),
    (r"model\.decoder\.layers\.\d+\.", "layers: norms"),
    (r"model\.decoder\.final_layer_norm\.", "final norm"),
    (r"(lm_head|score|qa_outputs)\.", "head"),
)
_COPIED_HEAD = "head (a copy of the token embedding)"


@dataclass(frozen=True)
class Tensor:
    """One stored tensor.

    Attributes:
        name: Canonical name, such as "model.decoder.layers.0.fc1.weight".
        shape: Shape in the canonical (torch) layout.
        dtype: Type it is stored in; of a quantised weight that of its numbers, such as "int4".
        nbytes: Its bytes, those of scales and the like included.
        file: Name of the file that holds it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    file: str


@dataclass(frozen=True)
class Part:
    """The tensors of one part of the model, summed up.

    Attributes:
        name: Name of the part, such as "layers: attention".
        tensors: How many there are.
        parameters: Their elements.
        nbytes: Their bytes.
    """

    name: str
    tensors: int
    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Description:
    """The result of `describe`.

    Attributes:
        path: Where the checkpoint is on disk, or its hub id.
        format: "safetensors", "torch-bin", "tf-h5", "flax-msgpack", "metaseq", "keras-hub",
            "deepspeed", "torch-distributed" or "numpy"; None if no weights can be read.
        files: Name and bytes of each weight file.
        config: The configuration; None if it cannot be read.
        head: The head on the decoder, as in `opt_core.params.Head`.
        parameters: Number of distinct parameters stored: a copy of the embedding is not counted.
        nbytes: Bytes of all tensors.
        dtypes: Stored type -> number of tensors.
        parts: The tensors by part of the model.
        tensors: Every tensor.
        vocabulary: Ids the tokenizer knows; None without a tokenizer.
        problems: One line for each; empty if the model loads as it should.
        notes: What was not taken as it is, one line each.
        quantization: Who quantised weights, and as what, such as "gptq: 72 weights as int4"; None:
            they are not.
        adapter: For an adapter's folder what it is; files and tensors are its own then, the
            configuration and the head those of the model with it merged.
    """

    path: Path
    format: str | None
    files: dict[str, int]
    config: OPTConfig | None
    head: Head | None
    parameters: int
    nbytes: int
    dtypes: dict[str, int]
    parts: tuple[Part, ...]
    tensors: tuple[Tensor, ...]
    vocabulary: int | None
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()
    quantization: str | None = None
    adapter: AdapterSummary | None = None


def describe(path_or_hub_id: str | PathLike[str], **hub: Any) -> Description:
    """Looks at a checkpoint without loading it, and at one on the hub without downloading it.

    A problem inside it becomes an entry of `problems` instead of an error.

    Args:
        path_or_hub_id: Folder, weight file, hub id, or "mini".
        **hub: `revision`, `token`, `local_files_only`, as in `opt_core.hub.resolve`.

    Raises:
        CheckpointError: There is no such folder or repository, or no model in it.
    """
    name = os.fspath(path_or_hub_id)
    asked = {key: value for key, value in hub.items() if key != "local_files_only"}
    remote = None if hub.get("local_files_only") else remote_files(name, **asked)
    if remote is None or CONFIG_FILE in remote.sizes:  # an adapter is small
        path = resolve(name, convertible=True, **hub)
        return _describe_adapter(path, hub) if is_adapter(path) else _describe(path)
    with download_headers(remote) as folder:
        found = _describe(folder, remote.sizes.keys())
        here = f"{folder}{os.sep}"

        def renamed(lines: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(s.replace(here, f"{name}/").replace(str(folder), name) for s in lines)

        problems, notes = renamed(found.problems), renamed(found.notes)
        return replace(found, path=Path(name), problems=problems, notes=notes)


def _describe(path: Path, names: Collection[str] | None = None) -> Description:
    """Describes a folder, in which files of these names are, or would be if it were complete."""
    folder = path if path.is_dir() else path.parent
    problems, notes = list[str](), list[str]()
    config = source = checkpoint = head = vocabulary = weights_error = None
    try:
        source = open_any_checkpoint(path)
        checkpoint = source.checkpoint
    except CheckpointError as error:
        weights_error = error
    try:
        config = OPTConfig.from_pretrained(folder) if source is None else source.read_config()
    except OPTError as error:
        if weights_error is not None:  # nothing here is a model: most likely a wrong path
            both = dict.fromkeys((str(weights_error), str(error)))
            raise CheckpointError("; ".join(both)) from None
        problems.append(str(error))
    if weights_error is not None:
        problems.append(str(weights_error))
    if checkpoint is not None:
        head = head_of(checkpoint)
        problems += _weight_problems(checkpoint, config, head, notes)
    if not is_keras_hub(folder) and any(
        (folder / name).exists() for name in ("vocab.json", "tokenizer.json")
    ):
        try:
            tokenizer = OPTTokenizer.from_pretrained(folder)
            vocabulary = tokenizer.id_limit
            problems += _tokenizer_problems(tokenizer, config) if config is not None else ()
        except OPTError as error:
            problems.append(str(error))
    if names is None and path.is_dir():
        names = {file.name for file in path.iterdir()}
    problems += _folder_problems(folder, names or ())
    tensors = _tensors(checkpoint)
    pair = {_LM_HEAD, _EMBEDDING} <= {tensor.name for tensor in tensors}
    tied = config is not None and config.tie_word_embeddings
    copied = {_LM_HEAD} if pair and tied else set[str]()
    return Description(
        path=path,
        format=checkpoint.format if checkpoint is not None else None,
        files={file.name: file.stat().st_size for file in checkpoint.files} if checkpoint else {},
        config=config,
        head=head,
        parameters=sum(math.prod(t.shape) for t in tensors if t.name not in copied),
        nbytes=sum(t.nbytes for t in tensors),
        dtypes=dict(Counter(t.dtype for t in tensors)),
        parts=tuple(_parts(tensors, copied)),
        tensors=tensors,
        vocabulary=vocabulary,
        problems=tuple(problems),
        notes=(*(source.notes if source is not None else ()), *notes),
        quantization=_quantization(checkpoint),
    )


def _describe_adapter(path: Path, hub: dict[str, Any]) -> Description:
    """Describes an adapter's folder, or the file of its weights."""
    folder = path if path.is_dir() else path.parent
    adapter = read_adapter(folder)
    found, config, problems = None, None, list[str]()
    try:
        found = open_any_checkpoint(path, **hub)
        config = found.plan().config
    except OPTError as error:
        problems.append(str(error))
    tensors = tuple(
        Tensor(t.name, t.shape, t.dtype.name, t.nbytes, t.file.name) for t in tensors_of(adapter)
    )
    return Description(
        path=path,
        format="peft",
        files={adapter.file.name: adapter.file.stat().st_size},
        config=config,
        head=None if found is None else found.head,
        parameters=sum(math.prod(t.shape) for t in tensors),
        nbytes=sum(t.nbytes for t in tensors),
        dtypes=dict(Counter(t.dtype for t in tensors)),
        parts=(),
        tensors=tensors,
        vocabulary=None,
        problems=tuple(problems),
        adapter=summarize(adapter),
    )


def _tensors(checkpoint: Checkpoint | None) -> tuple[Tensor, ...]:
    if checkpoint is None:
        return ()
    return tuple(
        Tensor(name, stored.shape, *_stored_as(stored), stored.file.name)
        for name, stored in checkpoint.tensors.items()
    )


def _stored_as(tensor: LazyTensor) -> tuple[str, int]:
    """Type and bytes of a tensor in its file."""
    if isinstance(tensor, PackedTensor):
        return tensor.label, tensor.stored_nbytes
    return tensor.dtype.name, tensor.nbytes


def _quantization(checkpoint: Checkpoint | None) -> str | None:
    if checkpoint is None or checkpoint.quantization is None:
        return None
    labels = Counter(t.label for t in checkpoint.tensors.values() if isinstance(t, PackedTensor))
    counts = ", ".join(f"{count} weights as {label}" for label, count in labels.items())
    return f"{checkpoint.quantization}: {counts}"


def _parts(tensors: Iterable[Tensor], copied: set[str]) -> Iterator[Part]:
    order = [*(name for _, name in _PARTS), _COPIED_HEAD, "other"]
    found: dict[str, list[Tensor]] = {name: [] for name in order}
    for tensor in tensors:
        part = next((name for rule, name in _PARTS if re.match(rule, tensor.name)), "other")
        found[_COPIED_HEAD if tensor.name in copied else part].append(tensor)
    for name, members in found.items():
        if members:
            parameters = sum(math.prod(t.shape) for t in members)
            yield Part(name, len(members), parameters, sum(t.nbytes for t in members))


def _weight_problems(
    checkpoint: Checkpoint, config: OPTConfig | None, head: Head, notes: list[str]
) -> Iterator[str]:
    """Reasons for which weights cannot be loaded; what would be left aside goes into the notes."""
    if config is None:
        return
    try:
        plan = plan_load(checkpoint, config, head)
    except CheckpointError as error:
        yield str(error)
        return
    notes += plan.notes
    if plan.config.tie_word_embeddings != config.tie_word_embeddings:
        yield (
            f"{checkpoint.folder}: lm_head.weight differs from the token embedding, but "
            "config.json ties them; it is loaded as stored: set tie_word_embeddings to false"
        )


def _tokenizer_problems(tokenizer: OPTTokenizer, config: OPTConfig) -> Iterator[str]:
    if tokenizer.id_limit > config.vocab_size:
        yield (
            f"the tokenizer has ids up to {tokenizer.id_limit - 1}, but config.json has "
            f"vocab_size={config.vocab_size}: they belong to different models"
        )
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        here, there = getattr(config, name), getattr(tokenizer, name)
        if here is not None and there is not None and there not in as_ids(here):
            yield f"config.json has {name}={here}, but the tokenizer has {there}"


def _folder_problems(folder: Path, names: Collection[str]) -> Iterator[str]:
    for index, single in _STALE.items():
        if index in names and single in names:
            yield (
                f"{folder / single}: not read: {index} beside it lists the shards that are; "
                "remove the single file, it is stale"
            )
    if (folder / "generation_config.json").exists():
        try:
            settings = GenerationConfig.from_pretrained(folder)
        except OPTError as error:
            yield str(error)
        else:
            yield from (line for _, line in settings.refused)
