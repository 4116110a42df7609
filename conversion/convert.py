"""Any OPT checkpoint in, any OPT checkpoint out: tensor by tensor, and atomically."""

import contextlib
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from conversion.readers import SourceCheckpoint, open_any_checkpoint
from conversion.sidecar_files import copy_sidecar_files
from conversion.writers import WRITERS, write_weights
from opt_core.checkpoints.atomic import check_is_new, new_folder
from opt_core.checkpoints.plan import LoadPlan
from opt_core.checkpoints.quantized.tensor import PackedTensor, numbers_of
from opt_core.checkpoints.quantized.writing import Fetch, written_scheme
from opt_core.checkpoints.save import save_quantized_checkpoint
from opt_core.checkpoints.tensors import float_dtype
from opt_core.errors import CheckpointError, ConfigError
from opt_core.hub import resolve
from opt_core.json_files import write_json
from opt_core.params import Head, ParamSpec
from opt_core.quantization import check_scheme

QUANTIZED = ("safetensors", "gptq")
"""Formats that hold quantised weights."""
_BITS = {"int8": 8, "int4": 4}
_ARCHITECTURES: dict[Head, str] = {
    "none": "OPTModel",
    "causal_lm": "OPTForCausalLM",
    "sequence_classification": "OPTForSequenceClassification",
    "question_answering": "OPTForQuestionAnswering",
}


@dataclass(frozen=True)
class Conversion:
    """The result of `convert`.

    Attributes:
        path: The new folder.
        source_format: The format read, such as "flax-msgpack".
        format: The format written.
        files: Name and bytes of each weight file.
        parameters: Parameters written.
        notes: Remarks for the user, one line each.
    """

    path: Path
    source_format: str
    format: str
    files: dict[str, int]
    parameters: int
    notes: tuple[str, ...]


def convert(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    to: str = "safetensors",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
    prefix: str = "",
    adapter: str | PathLike[str] | None = None,
    quantize: str | None = None,
    **hub: Any,
) -> Conversion:
    """Writes a checkpoint in another format, without the framework of either.

    No more than two tensors are in memory: one is written while the next one is read. The new
    folder appears when it is complete, and not at all if anything fails. Tokenizer and generation
    settings are carried along.

    Args:
        source: Folder, weight file, index of shards, hub id, or "mini". Its format is found from
            its files. An adapter's folder is merged into the model that it names.
        destination: A new folder.
        to: "safetensors", "torch-bin", "tf-h5", "flax-msgpack", "metaseq" or "keras-hub"; or
            "gptq", safetensors with the layers in GPTQ's layout, with `quantize`.
        dtype: Type to store, such as "float16"; None keeps each tensor's own.
        max_shard_size: Most bytes of tensors per file, as a number or as "5GB", "10GiB"; metaseq
            and KerasHub have one file.
        progress: Called with the bytes read so far and in all.
        prefix: Takes only the tensors whose names begin so, as the model's own: "language_model."
            for the OPT inside BLIP-2 and InstructBLIP, whose config.json has it as text_config.
        adapter: A PEFT adapter's folder or hub id, which is merged into `source`.
        quantize: Writes the weights as "int8" or "int4" (`opt_core.quantization`), in the files of
            compressed-tensors or, with `to="gptq"`, in GPTQ's. Weights that the source has
            quantised in numbers that fit are not rounded again.
        **hub: `revision`, `token`, `local_files_only`, as in `opt_core.hub.resolve`.

    Raises:
        CheckpointError: The source is missing, damaged or does not fit its configuration, the
            destination exists, or the disk refuses.
        ConfigError: The format cannot hold this model, or no quantised weights.
        TokenizerError: The tokenizer's files contradict one another.
    """
    formats = (*WRITERS, "gptq")
    if to not in formats:
        raise CheckpointError(f"to: expected one of {', '.join(formats)}, received {to!r}")
    check_scheme(quantize)
    if to not in QUANTIZED if quantize else to == "gptq":
        expected = "int4 or int8" if to == "gptq" else "None"
        raise ConfigError(f"quantize: expected {expected} with to={to!r}, received {quantize!r}")
    wanted = None if dtype is None else float_dtype(dtype)
    new = Path(os.path.abspath(Path(destination).expanduser()))
    check_is_new(new)  # before anything is downloaded
    path = resolve(source, convertible=True, **hub)
    found = open_any_checkpoint(path, prefix, adapter, **hub)
    plan = found.plan()
    is_packed = any(isinstance(t, PackedTensor) for t in found.checkpoint.tensors.values())
    if wanted is None and (found.adapter or is_packed):  # such weights are float32 until then
        wanted = _float_type(found)
    if quantize is None:
        files, notes = write_checkpoint(found, plan, new, to, wanted, max_shard_size, progress)
    else:
        gptq_bits = _BITS[quantize] if to == "gptq" else None
        fetch = _rounded(plan, quantize, gptq_bits, progress)
        files = write_quantized(
            found, plan, new, quantize, wanted, max_shard_size, fetch, gptq_bits
        )
        notes = (*found.notes, *plan.notes)
    return Conversion(
        new,
        found.checkpoint.format,
        to,
        files,
        sum(spec.size for spec, _ in plan.entries),
        notes,
    )


def write_checkpoint(
    found: SourceCheckpoint,
    plan: LoadPlan,
    new: Path,
    to: str,
    dtype: np.dtype[Any] | None,
    max_shard_size: int | str,
    progress: Callable[[int, int], None] | None,
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Writes the tensors of a plan and all that belongs to them, as `convert` does.

    Args:
        found: Where they come from.
        plan: The tensors, and the configuration they fit.
        new: The folder to make.
        to: One of `WRITERS`.
        dtype: Type to store; None keeps each tensor's own.
        max_shard_size: Most bytes of tensors per file.
        progress: Called with the bytes read so far and in all.

    Returns:
        Name and bytes of each weight file, and what the user should know.
    """
    writer, head = WRITERS[to], found.head
    total = sum(tensor.nbytes for _, tensor in plan.entries)
    not_finite: dict[str, int] = {}
    done = 0

    def fetched(name: str, nbytes: int, count: int) -> None:
        nonlocal done
        done += nbytes
        if count:
            not_finite[name] = count
        if progress is not None:
            progress(min(done, total), total)

    with enough_memory(found), new_folder(new) as stage:
        adapter = None if found.adapter is None else found.adapter.file.parent
        copy_sidecar_files(found.checkpoint.folder, stage, to == "keras-hub", adapter)
        names = write_weights(
            stage, writer, plan.config, plan.entries, dtype, max_shard_size, fetched
        )
        if to != "keras-hub":  # which has a config.json of its own
            stored = plan.entries[0][1].dtype.name if dtype is None else dtype.name
            values = plan.config.replace(dtype=stored).to_dict()
            values |= {"architectures": [_ARCHITECTURES[head]]}
            write_json(stage / "config.json", values)
        files = {name: (stage / name).stat().st_size for name in names}
    notes = [*found.notes, *plan.notes]
    notes += filter(None, [writer.note and writer.note(plan.config)])
    notes += [f"{name}: {count} values are NaN or infinite" for name, count in not_finite.items()]
    return files, tuple(notes)


def write_quantized(
    found: SourceCheckpoint,
    plan: LoadPlan,
    new: Path,
    scheme: str,
    dtype: np.dtype[Any] | None,
    max_shard_size: int | str,
    fetch: Fetch,
    gptq_bits: int | None = None,
) -> dict[str, int]:
    """Writes a quantised model and all that belongs to it, as `convert` does.

    Args:
        found: Where it comes from.
        plan: Its parameters, and the configuration they fit.
        new: The folder to make.
        scheme: "int8" or "int4".
        dtype: Type of what is stored in floating point; None: that of the source.
        max_shard_size: Most bytes of tensors per file.
        fetch: Gives a parameter's values, or its `QuantizedTensor` where it has one.
        gptq_bits: Bits of a number in GPTQ's layout, which they are written in then.

    Returns:
        Name and bytes of each weight file.
    """
    with enough_memory(found), new_folder(new) as stage:
        adapter = None if found.adapter is None else found.adapter.file.parent
        copy_sidecar_files(found.checkpoint.folder, stage, adapter=adapter)
        save_quantized_checkpoint(
            stage,
            plan.config,
            fetch,
            [spec for spec, _ in plan.entries],
            (dtype or _float_type(found)).name,
            scheme,
            max_shard_size,
            _ARCHITECTURES[found.head],
            gptq_bits,
        )
        return {path.name: path.stat().st_size for path in sorted(stage.glob("*.safetensors"))}


def _rounded(
    plan: LoadPlan,
    scheme: str,
    gptq_bits: int | None,
    progress: Callable[[int, int], None] | None,
) -> Fetch:
    """The parameters of a plan, each weight rounded to nearest when it is asked for."""
    tensors = {spec.name: tensor for spec, tensor in plan.entries}
    total, read = sum(tensor.nbytes for tensor in tensors.values()), set[str]()

    def fetch(spec: ParamSpec) -> Any:
        tensor, kept = tensors[spec.name], written_scheme(spec, scheme, gptq_bits)
        read.add(spec.name)
        if progress is not None:
            progress(sum(tensors[name].nbytes for name in read), total)
        return tensor.read() if kept is None else numbers_of(spec.name, tensor, kept)

    return fetch


def _float_type(found: SourceCheckpoint) -> np.dtype[Any]:
    """The type of what a checkpoint has in floating point."""
    tensors = found.checkpoint.tensors.values()
    types = (tensor.dtype for tensor in tensors if not isinstance(tensor, PackedTensor))
    return next(types, np.dtype(np.float32))


@contextlib.contextmanager
def enough_memory(found: SourceCheckpoint) -> Generator[None]:
    """Says in one line that a tensor does not fit into memory."""
    try:
        yield
    except MemoryError:
        raise CheckpointError(
            f"{found.checkpoint.folder}: not enough memory for its largest tensor"
        ) from None
