"""Writers, one per format: their names and layout for each tensor, and their files."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from conversion.formats.flax_msgpack import write_flax
from conversion.formats.keras_hub import check_keras_hub, keras_hub_tensors, write_keras_hub
from conversion.formats.names import TF_MODEL, flax_path, is_kernel, keras2_name
from conversion.formats.tf_h5 import write_tf_h5
from conversion.formats.torch_zip import write_torch
from conversion.streaming.background_flush import BackgroundFlusher
from conversion.streaming.lazy_tensors import (
    Buffer,
    MemoryTensor,
    contiguous,
    count_not_finite,
    joined,
    transposed,
    will_need,
)
from conversion.streaming.prefetch import Prefetcher
from opt_core.checkpoints.safetensors_format import PendingTensor, write_safetensors
from opt_core.checkpoints.save import parse_size
from opt_core.checkpoints.tensors import LazyTensor, cast_array
from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.json_files import write_json
from opt_core.params import ParamSpec

_BUFFERS = 2  # one tensor is written while the next one is made
Entries = Sequence[tuple[ParamSpec, LazyTensor]]
Write = Callable[[Path, Sequence[PendingTensor], OPTConfig, bool], None]
OnFetched = Callable[[str, int, int], None]


class Writer(NamedTuple):
    """How a format is written.

    Attributes:
        file: Name of its single file; shards and their index are named after it.
        sharded: Whether it may be split into shards.
        tensors: Names and layout of the format for each parameter.
        write: Writes one file: (path, tensors, configuration, whether it is the only one).
        in_index: What an index calls a tensor.
        note: A remark about a model, if there is one to make.
    """

    file: str
    sharded: bool
    tensors: Callable[[OPTConfig, Entries], Iterable[tuple[str, LazyTensor]]]
    write: Write
    in_index: Callable[[str], str] = str
    note: Callable[[OPTConfig], str | None] | None = None


def _canonical(_config: OPTConfig, entries: Entries) -> Iterator[tuple[str, LazyTensor]]:
    for spec, tensor in entries:
        yield spec.name, tensor


def _keras2(_config: OPTConfig, entries: Entries) -> Iterator[tuple[str, LazyTensor]]:
    for spec, tensor in entries:
        name = keras2_name(spec)
        yield name, transposed(tensor) if is_kernel(name) else tensor


def _flax(_config: OPTConfig, entries: Entries) -> Iterator[tuple[str, LazyTensor]]:
    # In the order in which they are written: the next one is made while one is written.
    for path, tensor in sorted(((flax_path(spec), t) for spec, t in entries), key=itemgetter(0)):
        name = "/".join(path)
        yield name, transposed(tensor) if is_kernel(name) else tensor


def _metaseq(_config: OPTConfig, entries: Entries) -> Iterator[tuple[str, LazyTensor]]:
    tensors = {spec.name: tensor for spec, tensor in entries}
    version = np.array([3.0], np.float32)  # without it, old metaseq drops the final norm
    yield "decoder.version", MemoryTensor("decoder.version", version, entries[0][1].file)
    for name, tensor in tensors.items():
        if name.startswith(("score.", "qa_outputs.")):
            raise ConfigError(f"metaseq has no {name}: it holds language models only")
        own = name.removeprefix("model.").replace("project_in.", "project_in_dim.")
        own = own.replace("project_out.", "project_out_dim.")
        if name.startswith("model.decoder.final_layer_norm."):
            own = own.replace("final_layer_norm", "layer_norm")
        if name == "lm_head.weight":
            own = "decoder.output_projection.weight"
        if ".self_attn.k_proj." in name:  # key, value and query are one matrix, in this order
            parts = [tensors[name.replace("k_proj", f"{letter}_proj")] for letter in "kvq"]
            shape = (3 * tensor.shape[0], *tensor.shape[1:])
            yield own.replace("k_proj", "qkv_proj"), joined(name, shape, parts)
        elif not own.startswith("decoder.layers.") or own.split(".")[-2] not in (
            "q_proj",
            "v_proj",
        ):
            yield own, tensor


def _plain(write: Callable[[Path, Sequence[PendingTensor]], None]) -> Write:
    """A writer that needs to know no more than the tensors."""

    def plain(
        path: Path, tensors: Sequence[PendingTensor], _config: OPTConfig, _single: bool
    ) -> None:
        write(path, tensors)

    return plain


def _write_tf(
    path: Path, tensors: Sequence[PendingTensor], _config: OPTConfig, single: bool
) -> None:
    write_tf_h5(path, tensors, single)


def _write_keras_hub(
    path: Path, tensors: Sequence[PendingTensor], config: OPTConfig, _single: bool
) -> None:
    write_keras_hub(path, tensors, config)


def _write_metaseq(
    path: Path, tensors: Sequence[PendingTensor], config: OPTConfig, _single: bool
) -> None:
    settings = {
        "decoder_attention_heads": config.num_attention_heads,
        "decoder_normalize_before": config.do_layer_norm_before,
        "activation_fn": config.activation_function,
        "share_decoder_input_output_embed": config.tie_word_embeddings,
    }
    write_torch(path, tensors, "model", {"args": None, "cfg": {"model": settings}})


def _for_keras_hub(config: OPTConfig, entries: Entries) -> Iterator[tuple[str, LazyTensor]]:
    check_keras_hub(config, [spec for spec, _ in entries])
    return keras_hub_tensors(config, entries)


def _in_tf_index(name: str) -> str:
    return f"{TF_MODEL}/{name}"


def _tf_note(config: OPTConfig) -> str | None:
    if config.tie_word_embeddings:
        return None
    return "transformers' TensorFlow class ties every head: it cannot use this lm_head.weight"


WRITERS: dict[str, Writer] = {
    "safetensors": Writer("model.safetensors", True, _canonical, _plain(write_safetensors)),
    "torch-bin": Writer("pytorch_model.bin", True, _canonical, _plain(write_torch)),
    "tf-h5": Writer("tf_model.h5", True, _keras2, _write_tf, _in_tf_index, _tf_note),
    "flax-msgpack": Writer("flax_model.msgpack", True, _flax, _plain(write_flax)),
    "metaseq": Writer("reshard.pt", False, _metaseq, _write_metaseq),
    "keras-hub": Writer("model.weights.h5", False, _for_keras_hub, _write_keras_hub),
}
"""The formats that can be written, by the names that `convert` takes."""


def write_weights(
    folder: Path,
    writer: Writer,
    config: OPTConfig,
    entries: Entries,
    dtype: np.dtype[Any] | None,
    max_shard_size: int | str,
    fetched: OnFetched,
) -> list[str]:
    """Writes the weight files of a checkpoint, and their index if there are several.

    Args:
        folder: Where to; must exist.
        writer: The format's.
        config: The model's configuration.
        entries: Parameters and their tensors in the canonical layout.
        dtype: Type to store, or None for the one each tensor has.
        max_shard_size: Most bytes of tensors per file, as in `save_checkpoint`.
        fetched: Called with the name of each tensor, its bytes as they were stored, and how many
            of its values are NaN or infinite.

    Returns:
        Names of the weight files.

    Raises:
        OPTError: The format cannot hold the model, a value is out of the type's range, or the disk
            refuses.
    """
    limit = parse_size(max_shard_size)
    tensors = list(writer.tensors(config, entries))
    following = [*(tensor for _, tensor in tensors[1:]), None]
    buffers = [Buffer() for _ in range(_BUFFERS)]  # taken in turn
    tasks = [
        lambda now=now, then=then, i=i: _fetch(now, then, dtype, buffers[i % _BUFFERS])
        for i, ((_, now), then) in enumerate(zip(tensors, following, strict=True))
    ]
    with Prefetcher(tasks) as prefetcher, BackgroundFlusher(folder) as flusher:

        def pending(index: int, name: str, tensor: LazyTensor) -> PendingTensor:
            def fetch() -> NDArray[Any]:
                array, not_finite = prefetcher.take(index)
                flusher.wrote(array.nbytes)  # nearly: this one is written next
                fetched(tensor.name, tensor.nbytes, not_finite)
                return array

            return PendingTensor(name, tensor.shape, _target_dtype(tensor, dtype), fetch)

        names = _write(
            folder, writer, config, limit, [pending(i, *item) for i, item in enumerate(tensors)]
        )
        flusher.finish()
        return names


def _write(
    folder: Path, writer: Writer, config: OPTConfig, limit: int, pending: list[PendingTensor]
) -> list[str]:
    shards = _split(pending, limit) if writer.sharded else [pending]
    stem, _, suffix = writer.file.partition(".")
    count = len(shards)
    names = [f"{stem}-{i:05}-of-{count:05}.{suffix}" for i in range(1, count + 1)]
    names = names if count > 1 else [writer.file]
    for name, shard in zip(names, shards, strict=True):
        writer.write(folder / name, shard, config, count == 1)
    if count > 1:
        where = {writer.in_index(t.name): n for n, s in zip(names, shards, strict=True) for t in s}
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in pending)},
            "weight_map": where,
        }
        write_json(folder / f"{writer.file}.index.json", index)
    return names


def _target_dtype(tensor: LazyTensor, dtype: np.dtype[Any] | None) -> np.dtype[Any]:
    return tensor.dtype if dtype is None else dtype


def _fetch(
    tensor: LazyTensor,
    following: LazyTensor | None,
    dtype: np.dtype[Any] | None,
    buffer: Buffer,
) -> tuple[NDArray[Any], int]:
    if following is not None:
        will_need(following)
    array = tensor.read()
    not_finite = count_not_finite(array)
    array = cast_array(tensor.name, array, _target_dtype(tensor, dtype))
    return contiguous(array, buffer), not_finite


def _split(tensors: Sequence[PendingTensor], limit: int) -> list[list[PendingTensor]]:
    shards: list[list[PendingTensor]] = [[]]
    remaining: float = limit
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > remaining:
            shards.append([])
            remaining = limit
        shards[-1].append(tensor)
        remaining -= tensor.nbytes
    return shards
