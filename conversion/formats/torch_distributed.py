"""Torch's Distributed Checkpoint: a pickle that says which part of a tensor is where, and parts.

FSDP, accelerate and Lightning write it. The pickle is read like torch's own files: nothing is
imported or run, and what it may name is a short list. A part is a torch file at an offset of a file
of many; the tensor is put together from them when it is read.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from conversion.formats.metaseq_pickle import Inert, InertMachine
from conversion.streaming.lazy_tensors import joined
from opt_core.checkpoints.load import Checkpoint, is_plain_name, unwrapped
from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.checkpoints.torch_format import TorchArchive
from opt_core.checkpoints.torch_pickle import Global, StorageView, parse_pickle
from opt_core.checkpoints.wrappers import STATE_KEYS
from opt_core.errors import CheckpointError

METADATA = ".metadata"
"""The file whose presence makes a folder a distributed checkpoint."""

_MAX_METADATA = 1 << 28
_ALLOWED = re.compile(
    r"torch\.distributed\.checkpoint\.metadata\.(Metadata|(Tensor|Bytes|Chunk)StorageMetadata"
    r"|MetadataIndex|TensorProperties|_MEM_FORMAT_ENCODING|StorageMeta)"
    r"|torch\.distributed\._shard\.sharded_tensor\.metadata\.(TensorProperties|MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|torch\.(Size|serialization\._get_layout|bool|bfloat16|u?int\d+|float\d\w*|complex\d+)"
    r"|collections\.OrderedDict|pathlib(\._local)?\.(Posix|Windows)Path"
)
_OPTIMIZER = re.compile(r"optim|(lr_)?scheduler")
_ADVICE = (
    "put it together with `python -m torch.distributed.checkpoint.format_utils dcp_to_torch`, "
    "which needs torch"
)
Place = tuple[int, ...]


class _Machine(InertMachine):
    """Takes what a distributed checkpoint's metadata is made of, and no other name."""

    def _global(self, module: object, name: object) -> Global:
        found = f"{module}.{name}"
        if not _ALLOWED.fullmatch(found):
            raise CheckpointError(
                f"{self.path}: refused {found!r}: not what the metadata of a checkpoint is made of"
            )
        return Global(found)

    def _set(self, items: list[Any]) -> None:
        target, pairs = self._container(dict), iter(items)
        for key, value in zip(pairs, pairs, strict=True):
            if not isinstance(key, str | int | Inert):
                raise ValueError(f"a dict key of type {type(key).__name__}")
            target[key] = value


def open_distributed(folder: Path) -> Checkpoint:
    """Reads the headers of a distributed checkpoint.

    Args:
        folder: Where its `.metadata` is.

    Raises:
        CheckpointError: A file is missing or damaged, or parts do not make up their tensors.
    """
    path = folder / METADATA
    source = TensorFile(path)
    if source.size > _MAX_METADATA:
        raise CheckpointError(f"{path}: expected at most {_MAX_METADATA} bytes")
    metadata = _Machine(path).parse(source.bytes_at(0, source.size))
    entries, places, paths = (
        _mapping(_field(path, metadata, name))
        for name in ("state_dict_metadata", "storage_data", "planner_data")
    )
    parts: dict[str, dict[Place, Inert]] = defaultdict(dict)
    for index, place in places.items():
        name, offset = _field(path, index, "fqn"), _field(path, index, "offset")
        if isinstance(name, str) and isinstance(place, Inert):
            parts[name][_place(path, offset or ())] = place
    files: dict[str, TensorFile] = {}
    tensors: dict[str, LazyTensor] = {}
    for name, own in _weights(entries, paths):
        size = _place(path, _field(path, entries[name], "size"))
        pieces = {
            at: _read_part(folder, own, files, place)
            for at, place in parts[name].items()
            if len(at) == len(size)
        }
        if own in tensors:
            raise CheckpointError(f"{path}: {own!r} is there twice, under two names")
        tensors[own] = _whole(path, own, size, pieces)
    if not tensors:
        raise CheckpointError(f"{path}: no weights of a model in it")
    found = tuple(file.path for file in files.values())
    return unwrapped(Checkpoint(folder, (path, *found), tensors, "torch-distributed"))


def _field(path: Path, item: object, name: str) -> Any:
    state = item.state if isinstance(item, Inert) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: not as torch writes it: no {name} where one is expected")
    return cast(dict[str, Any], state).get(name)


def _mapping(value: object) -> dict[Any, Any]:
    return cast(dict[Any, Any], value) if isinstance(value, dict) else {}


def _place(path: Path, value: object) -> Place:
    sizes = cast(tuple[object, ...], value) if isinstance(value, tuple) else (None,)
    if not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        raise CheckpointError(f"{path}: not as torch writes it: {value!r:.60} is no place or size")
    return cast(Place, sizes)


def _weights(entries: Mapping[Any, Any], paths: Mapping[Any, Any]) -> Iterator[tuple[str, str]]:
    """Names of the model's tensors, and what the model itself calls them."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, entry in entries.items():
        if isinstance(name, str) and isinstance(entry, Inert) and "Tensor" in entry.kind:
            keys = paths.get(name)
            keys = cast(tuple[Any, ...], keys) if isinstance(keys, tuple) and keys else (name,)
            if not any(_OPTIMIZER.match(str(key)) for key in keys[:-1]):
                found[name] = keys
    inside = {n: keys for n, keys in found.items() if set(STATE_KEYS).intersection(keys[:-1])}
    for name, keys in (inside or found).items():
        yield name, keys[-1] if "." in str(keys[-1]) else name


def _read_part(folder: Path, name: str, files: dict[str, TensorFile], place: Inert) -> LazyTensor:
    path = folder / METADATA
    file, start, size = (_field(path, place, key) for key in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or not is_plain_name(file):
        raise CheckpointError(f"{path}: expected a file beside it, received {file!r:.60}")
    start, size = _place(path, (start, size))
    if _field(path, place, "transform_descriptors"):
        raise CheckpointError(f"{folder / file}: {name!r} is compressed: {_ADVICE}")
    if file not in files:
        files[file] = TensorFile(folder / file)
    if start + size > files[file].size:
        raise CheckpointError(
            f"{folder / file}: {name!r} ends at byte {start + size} but the file has "
            f"{files[file].size}: it is truncated; copy it again"
        )
    archive = TorchArchive(files[file], start, size)
    view = parse_pickle(archive.pickle, folder / file)
    if not isinstance(view, StorageView):
        raise CheckpointError(f"{folder / file}: {name!r}: expected a tensor")
    return archive.tensor(name, view)


def _whole(path: Path, name: str, size: Place, parts: Mapping[Place, LazyTensor]) -> LazyTensor:
    """A tensor of parts that are cut along its first two dimensions."""
    rows: dict[int, dict[int, LazyTensor]] = defaultdict(dict)
    for at, part in parts.items():
        if math.prod(part.shape) or not math.prod(size):
            first, second, *others = (*at, 0, 0)
            if any(others) or part.shape[2:] != size[2:] or len(part.shape) != len(size):
                raise CheckpointError(
                    f"{path}: {name!r} is cut along several dimensions: {_ADVICE}"
                )
            rows[first][second] = part
    bands: list[LazyTensor] = []
    end = 0
    for first, columns in sorted(rows.items()):
        band = [part for _, part in sorted(columns.items())]
        starts = [sum(p.shape[1] for p in band[:i]) if i else 0 for i in range(len(band))]
        width = sum(part.shape[1] for part in band) if len(size) > 1 else 0
        if first != end or sorted(columns) != starts or (width,) != (size[1:2] or (0,)):
            break
        height = band[0].shape[0] if size else 1
        bands.append(joined(name, (height, *size[1:]), band, 1) if len(band) > 1 else band[0])
        end += height
    if end != (size[0] if size else 1):
        raise CheckpointError(
            f"{path}: {name!r} of shape {list(size)}: some of its {len(parts)} parts are missing"
        )
    return joined(name, size, bands)
