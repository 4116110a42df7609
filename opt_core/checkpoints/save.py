"""Writes checkpoints in Hugging Face's layout: config.json and safetensors, sharded when large."""

import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.quantized.settings import SIDE_FILE
from opt_core.checkpoints.quantized.writing import Fetch, quantized_files
from opt_core.checkpoints.safetensors_format import PendingTensor, write_safetensors
from opt_core.checkpoints.tensors import cast_array, float_dtype
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.json_files import write_json
from opt_core.params import ParamSpec

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]?)(I?)B", re.IGNORECASE)


def save_checkpoint(
    folder: Path,
    config: OPTConfig,
    tensors: Mapping[str, Callable[[], NDArray[Any]]],
    specs: Sequence[ParamSpec],
    dtype: str,
    max_shard_size: int | str = "5GB",
    architecture: str = "OPTForCausalLM",
    more: Sequence[PendingTensor] = (),
) -> None:
    """Writes config.json and the weights of a model, readable by `transformers`.

    A new folder appears whole or not at all. In an existing one, all new files are written before
    the first of them takes its place, and weights of an earlier save are removed at the end; other
    files stay. The folder may be the one the tensors are being read from.

    Args:
        folder: Where to; made if missing.
        config: The model's configuration.
        tensors: Canonical name -> function that makes the array, called once, one after another.
        specs: The parameters to write (`opt_core.params.param_specs`).
        dtype: Type to store, such as "float16".
        max_shard_size: Most bytes of tensors per file, as a number or as "5GB", "200MB", "10GiB";
            a larger tensor gets a file of its own.
        architecture: Class name for `transformers`.
        more: Tensors that are none of OPT's, to be written behind them.

    Raises:
        CheckpointError: A tensor is missing, unknown or misshapen, the size is malformed, or the
            disk refuses.
    """
    target = float_dtype(dtype)
    _check_names(folder, config, tensors, specs)

    def pending(spec: ParamSpec) -> PendingTensor:
        def fetch() -> NDArray[Any]:
            return cast_array(spec.name, np.asarray(tensors[spec.name]()), target)

        return PendingTensor(spec.name, spec.shape, target, fetch)

    values = config.replace(dtype=dtype).to_dict() | {"architectures": [architecture]}
    write_folder(folder, [*map(pending, specs), *more], values, max_shard_size)


def save_quantized_checkpoint(
    folder: Path,
    config: OPTConfig,
    fetch: Fetch,
    specs: Sequence[ParamSpec],
    dtype: str,
    scheme: str,
    max_shard_size: int | str = "5GB",
    architecture: str = "OPTForCausalLM",
    gptq_bits: int | None = None,
    more: Sequence[PendingTensor] = (),
) -> None:
    """Writes config.json and the weights of a quantised model, as compressed-tensors has them.

    Args:
        folder: As in `save_checkpoint`.
        config: The model's configuration.
        fetch: Gives a parameter's values, or its `QuantizedTensor` where it has one.
        specs: The parameters to write.
        dtype: Type of what is stored in floating point.
        scheme: "int8" or "int4".
        max_shard_size: As in `save_checkpoint`.
        architecture: Class name for `transformers`.
        gptq_bits: Bits of a number in GPTQ's layout, which they are written in then.
        more: As in `save_checkpoint`.

    Raises:
        CheckpointError: The size is malformed, or the disk refuses.
        ConfigError: GPTQ's layout has no place for weights of these sizes.
    """
    files = quantized_files(specs, fetch, scheme, float_dtype(dtype), gptq_bits)
    values = config.replace(dtype=dtype).to_dict() | {"architectures": [architecture]}
    values |= {"quantization_config": files.config}
    write_folder(folder, [*files.main, *more], values, max_shard_size, files.side)


def write_folder(
    folder: Path,
    tensors: Sequence[PendingTensor],
    config: dict[str, Any],
    max_shard_size: int | str,
    side: Sequence[PendingTensor] = (),
) -> None:
    """Writes weight files, the index of several, and config.json, as `save_checkpoint` says.

    Args:
        folder: Where to.
        tensors: The weights.
        config: Contents of config.json.
        max_shard_size: Most bytes of tensors per file.
        side: Tensors of the file that no index names; if there are any, there is an index.

    Raises:
        CheckpointError: The size is malformed, or the disk refuses.
    """
    shards = _split(tensors, parse_size(max_shard_size), indexed=bool(side))
    has_index = len(shards) > 1 or bool(side)
    is_new = not folder.exists()
    stage = (folder.parent if is_new else folder) / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        stage.mkdir()
        for name, shard in shards.items():
            write_safetensors(stage / name, shard)
        if side:
            write_safetensors(stage / SIDE_FILE, side)
        if has_index:
            write_json(stage / INDEX_FILE, _index(shards))
        write_json(stage / "config.json", config)
        if is_new:
            stage.rename(folder)
        else:
            files = [*shards, *([SIDE_FILE] if side else []), *([INDEX_FILE] if has_index else [])]
            _move_into(folder, stage, files)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def parse_size(size: int | str) -> int:
    """Bytes in "5GB" (decimal), "10GiB" (binary) or a plain number.

    Raises:
        CheckpointError: It is no size, or less than one byte.
    """
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match:
        number, prefix, binary = match.groups()
        power = " KMGT".index(prefix.upper() or " ")
        bytes_ = int(float(number) * (1024 if binary else 1000) ** power)
    else:
        bytes_ = size if isinstance(size, int) and not isinstance(size, bool) else 0
    if bytes_ < 1:
        raise CheckpointError(
            "max_shard_size: expected bytes, or a size such as '5GB', '200MB' or '10GiB', "
            f"received {size!r}"
        )
    return bytes_


def _check_names(
    folder: Path, config: OPTConfig, tensors: Mapping[str, object], specs: Sequence[ParamSpec]
) -> None:
    names = {spec.name for spec in specs}
    missing = sorted(names - tensors.keys())
    unknown = tensors.keys() - names
    if config.tie_word_embeddings:
        unknown -= {"lm_head.weight"}  # the embedding under another name
    for what, found in (("missing", missing), ("unknown", sorted(unknown))):
        if found:
            names_ = ", ".join(found[:8])
            raise CheckpointError(f"{folder}: cannot save: {len(found)} tensors {what}: {names_}")


def _split(
    tensors: Sequence[PendingTensor], limit: int, indexed: bool = False
) -> dict[str, list[PendingTensor]]:
    shards: list[list[PendingTensor]] = [[]]
    room = limit
    for tensor in tensors:
        if shards[-1] and tensor.nbytes > room:
            shards.append([])
            room = limit
        shards[-1].append(tensor)
        room -= tensor.nbytes
    count = len(shards)
    if count == 1 and not indexed:
        return {SINGLE_FILE: shards[0]}
    return {f"model-{i:05}-of-{count:05}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, Sequence[PendingTensor]]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(t.nbytes for shard in shards.values() for t in shard)},
        "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
    }


def _move_into(folder: Path, stage: Path, files: list[str]) -> None:
    for name in [*files, "config.json"]:
        (stage / name).replace(folder / name)
    # A leftover index first: while it is there, it decides which files are the weights.
    shards = [p.name for p in folder.iterdir() if _SHARD.fullmatch(p.name)]
    for name in [INDEX_FILE, SINGLE_FILE, SIDE_FILE, *shards]:
        if name not in files:
            (folder / name).unlink(missing_ok=True)
