"""Meta's own checkpoints: one file, model-parallel parts, and FSDP shards of flat parameters.

Three nested splits are undone without reading a tensor. FSDP cuts the parameters of a module,
flattened and joined, into equal shards (`shard_metadata` says how). Model parallelism splits a
matrix by rows or columns. And attention's three projections are one matrix, in the order key,
value, query, of which every model-parallel part has its own.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from conversion.formats.metaseq_pickle import Inert, InertMachine, find_settings
from conversion.streaming.lazy_tensors import joined
from opt_core.checkpoints.load import Checkpoint, canonical_name, unwrapped
from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.checkpoints.torch_format import TorchArchive
from opt_core.checkpoints.torch_pickle import StorageView
from opt_core.checkpoints.wrappers import unwrap_state
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.params import POSITION_OFFSET
from opt_core.presets import PRESETS

Tensors = Mapping[str, LazyTensor]

_NAME = re.compile(
    r"(?P<stem>.+?)(?:-model_part-(?P<part>\d+))?(?:-shard(?P<shard>\d+))?\.(?:pth?|ckpt)"
)
_BOOKKEEPING = re.compile(r"(optimizer|scheduler|scaler|rng_state|random_states)[\w.-]*")
_STEMS = ("reshard", "restored", "consolidated")  # tried first where a folder has several
_WRAPPERS = ("_fsdp_wrapped_module.", "_fpw_module.", "module.")
_BY_ROWS = re.compile(
    r"(embed_tokens|output_projection)\.weight$|(fc1|[qkv]_proj|qkv_proj)\.(weight|bias)$"
)
_BY_COLUMNS = re.compile(r"(fc2|out_proj)\.weight$")
_RENAMED = (
    ("decoder.layer_norm.", "decoder.final_layer_norm."),
    ("decoder.project_in_dim.", "decoder.project_in."),
    ("decoder.project_out_dim.", "decoder.project_out."),
    ("decoder.output_projection.", "lm_head."),
)
_SETTINGS = frozenset(["decoder_attention_heads", "decoder_normalize_before", "activation_fn"])


@dataclass(frozen=True)
class _Part:
    """One file: its tensors by metaseq's names, and what says how they were cut."""

    path: Path
    tensors: dict[str, LazyTensor]
    metadata: object
    settings: dict[str, Any]


def open_metaseq(path: Path) -> tuple[Checkpoint, dict[str, Any]]:
    """Reads the headers of a metaseq checkpoint, or of another dict of tensors that torch wrote.

    Args:
        path: A .pt file, with its sisters if its name has a model_part or a shard number; or a
            folder of them.

    Returns:
        The checkpoint under canonical names, and those settings of its training that say what
        shapes cannot.

    Raises:
        CheckpointError: A file is missing, damaged, or does not fit its sisters.
    """
    groups = _files(path)
    parts = [[_read(file) for file in shards] for shards in groups]
    whole = _join_parts([_join_shards(shards) for shards in parts])
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in canonical_tensors(whole):
        if name in tensors:
            raise CheckpointError(f"{tensor.file}: {name!r} is there twice, under two names")
        tensors[name] = tensor
    if not tensors:
        raise CheckpointError(f"{path}: no tensors")
    files = tuple(file for shards in groups for file in shards)
    folder = path if path.is_dir() else path.parent
    kind = "torch-bin" if any("model.decoder." in name for name in whole) else "metaseq"
    checkpoint = unwrapped(Checkpoint(folder, files, tensors, kind))
    return checkpoint, parts[0][0].settings


def torch_files(folder: Path) -> list[str]:
    """Names of the files in a folder that may hold a model in one of torch's own formats."""
    names = sorted(p.name for suffix in ("pt", "pth", "ckpt") for p in folder.glob(f"*.{suffix}"))
    return [name for name in names if not _BOOKKEEPING.fullmatch(name)]


def _files(path: Path) -> list[list[Path]]:
    """The files of one checkpoint: a list of shards for each model-parallel part."""
    names = [path.name]
    if path.is_dir():
        names = torch_files(path)
    folder = path if path.is_dir() else path.parent
    stems: dict[str, list[re.Match[str]]] = {}
    for match in filter(None, map(_NAME.fullmatch, names)):
        stems.setdefault(match["stem"], []).append(match)
    if not path.is_dir() and (match := _NAME.fullmatch(path.name)):
        if match["part"] is None and match["shard"] is None:
            return [[path]]
        siblings = map(_NAME.fullmatch, sorted(p.name for p in folder.iterdir()))
        stems = {match["stem"]: [m for m in siblings if m and m["stem"] == match["stem"]]}
    chosen = next((stem for stem in _STEMS if stem in stems), None)
    if chosen is None and len(stems) != 1:
        found = ", ".join(sorted(stems)[:8]) or "none"
        raise CheckpointError(
            f"{path}: expected one checkpoint, found {found}; give one of these files"
        )
    members = stems[chosen or next(iter(stems))]
    if any(m["part"] or m["shard"] for m in members):
        members = [m for m in members if m["part"] or m["shard"]]
    grid: dict[int, dict[int, Path]] = {}
    for m in members:
        grid.setdefault(int(m["part"] or 0), {})[int(m["shard"] or 0)] = folder / m.string
    counts = {len(shards) for shards in grid.values()}
    if len(counts) > 1 or any(
        sorted(numbers) != list(range(len(numbers))) for numbers in (grid, *grid.values())
    ):
        raise CheckpointError(
            f"{folder / members[0].string}: some of its model parts or shards are missing: found "
            f"{len(members)} files"
        )
    return [[shards[i] for i in sorted(shards)] for _, shards in sorted(grid.items())]


def _read(path: Path) -> _Part:
    archive = TorchArchive(TensorFile(path))
    content = InertMachine(path).parse(archive.pickle)
    if isinstance(content, Inert):
        raise CheckpointError(
            f"{path}: a pickled {content.kind}, not its weights: save its state_dict() instead"
        )
    values = cast(dict[object, object], content) if isinstance(content, dict) else {}
    model = unwrap_state(values)
    state = cast(dict[object, object], model) if isinstance(model, dict) else {}
    tensors: dict[str, LazyTensor] = {
        name: archive.tensor(name, view)
        for name, view in state.items()
        if isinstance(name, str) and isinstance(view, StorageView)
    }
    if not tensors or len(tensors) != len(state):
        raise CheckpointError(
            f"{path}: expected a dict of tensors, alone or under a name such as 'model'"
        )
    settings = find_settings([values.get("cfg"), values.get("args")], _SETTINGS)
    return _Part(path, tensors, values.get("shard_metadata"), settings)


def _join_shards(shards: Sequence[_Part]) -> Tensors:
    """Undoes FSDP."""
    first = shards[0]
    if not any("flat_param" in name for name in first.tensors):
        if len(shards) > 1:
            raise CheckpointError(f"{first.path}: one of {len(shards)} shards, but of what?")
        return first.tensors
    whole = {name: t for name, t in first.tensors.items() if "flat_param" not in name}
    used: set[str] = set()
    for i, entry in enumerate(_entries(first)):
        for flat, params in _mapping(entry.get("params"), first).items():
            pieces: list[LazyTensor] = []
            key = ".".join(filter(None, [str(entry.get("fsdp_path") or ""), flat]))
            for shard in shards:
                sibling = _entry_of(shard, i)
                padding = _mapping(_mapping(sibling.get("params"), shard).get(flat), shard)
                pieces.append(_unpadded(shard, key, padding.get("padding")))
                if entry.get("no_broadcast_optim_state"):
                    break  # experts: each shard has its own
            used.add(key)
            for name, tensor in _split(first, key, pieces, _mapping(params, first)):
                whole[".".join(filter(None, [str(entry.get("fsdp_path") or ""), name]))] = tensor
    if left := [n for n in first.tensors if "flat_param" in n and n not in used]:
        raise CheckpointError(f"{first.path}: shard_metadata does not describe {left[0]!r}")
    return whole


def _entries(part: _Part) -> list[dict[str, Any]]:
    metadata = _mapping(part.metadata, part).get("param_metadata")
    if not isinstance(metadata, list) or not metadata:
        raise CheckpointError(
            f"{part.path}: flat parameters, but no shard_metadata that describes them"
        )
    return [_mapping(entry, part) for entry in cast(list[object], metadata)]


def _entry_of(part: _Part, index: int) -> dict[str, Any]:
    entries = _entries(part)
    if index >= len(entries):
        raise CheckpointError(f"{part.path}: shard_metadata differs from the first shard's")
    return entries[index]


def _mapping(value: object, part: _Part) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{part.path}: shard_metadata is not as FSDP writes it")
    return cast(dict[str, Any], value)


def _unpadded(part: _Part, key: str, padding: object) -> LazyTensor:
    tensor = part.tensors.get(key)
    if tensor is None or len(tensor.shape) != 1:
        raise CheckpointError(f"{part.path}: no flat parameter {key!r}")
    if not isinstance(padding, int) or not 0 <= padding <= tensor.shape[0]:
        raise CheckpointError(f"{part.path}: {key!r}: a padding that does not fit")
    return tensor.rows(0, tensor.shape[0] - padding)


def _split(
    part: _Part, key: str, pieces: Sequence[LazyTensor], params: Mapping[str, Any]
) -> Iterator[tuple[str, LazyTensor]]:
    names, shapes = (list(cast(Sequence[Any], params.get(k) or ())) for k in ("names", "shapes"))
    sizes: list[int] = []
    for shape in shapes:
        if not isinstance(shape, tuple) or not all(
            type(n) is int and n >= 0 for n in cast(tuple[Any, ...], shape)
        ):
            raise CheckpointError(f"{part.path}: {key!r}: expected a shape")
        sizes.append(math.prod(cast(tuple[int, ...], shape)))
    total = sum(piece.shape[0] for piece in pieces)
    if len(names) != len(shapes) or sum(sizes) != total:
        raise CheckpointError(
            f"{part.path}: {key!r}: shard_metadata describes {sum(sizes)} elements, but "
            f"the shards hold {total}"
        )
    flat, at = joined(key, (total,), pieces), 0
    for name, shape, size in zip(names, shapes, sizes, strict=True):
        yield str(name), joined(str(name), shape, [flat.rows(at, at + size)])
        at += size


def _join_parts(parts: Sequence[Tensors]) -> Tensors:
    """Undoes model parallelism."""
    if len(parts) == 1:
        return parts[0]
    whole: dict[str, LazyTensor] = {}
    for name, first in parts[0].items():
        pieces = [part[name] for part in parts if name in part]
        if len(pieces) < len(parts):
            raise CheckpointError(f"{first.file}: {name!r} is not in every model part")
        if name.endswith(("qkv_proj.weight", "qkv_proj.bias")):
            for letter, thirds in zip(
                "kvq", zip(*map(_split_qkv, pieces), strict=True), strict=True
            ):
                single = name.replace("qkv_proj", f"{letter}_proj")
                whole[single] = _joined_along(0, single, thirds)
        elif _BY_ROWS.search(name):
            whole[name] = _joined_along(0, name, pieces)
        elif _BY_COLUMNS.search(name):
            whole[name] = _joined_along(1, name, pieces)
        else:
            whole[name] = first  # every part has all of it
    return whole


def _joined_along(axis: int, name: str, pieces: Sequence[LazyTensor]) -> LazyTensor:
    if len({len(p.shape) for p in pieces}) > 1 or len(pieces[0].shape) <= axis:
        raise CheckpointError(f"{pieces[0].file}: {name!r}: its parts do not fit together")
    shape = list(pieces[0].shape)
    shape[axis] = sum(piece.shape[axis] for piece in pieces)
    return joined(name, shape, pieces, axis)


def _split_qkv(tensor: LazyTensor) -> list[LazyTensor]:
    rows = tensor.shape[0] if tensor.shape else 0
    if rows % 3:
        raise CheckpointError(
            f"{tensor.file}: {tensor.name!r}: {rows} rows are no three projections"
        )
    return [tensor.rows(i * rows // 3, (i + 1) * rows // 3) for i in range(3)]


def canonical_tensors(tensors: Tensors) -> Iterator[tuple[str, LazyTensor]]:
    """Tensors under canonical names; what is none of the model's is left out.

    Args:
        tensors: By metaseq's names, the three projections of a layer in one matrix or in three.
    """
    for key, tensor in tensors.items():
        name = key
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        for old, new in _RENAMED:
            if name.startswith(old):
                name = new + name.removeprefix(old)
        if name.endswith(("qkv_proj.weight", "qkv_proj.bias")):
            for letter, third in zip("kvq", _split_qkv(tensor), strict=True):
                single = canonical_name(name.replace("qkv_proj", f"{letter}_proj"))
                yield str(single), third
        elif (canonical := canonical_name(name)) is not None:
            yield canonical, tensor


def derive_config(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> OPTConfig:
    """The configuration of a checkpoint without config.json, from its shapes and its training.

    Args:
        checkpoint: From `open_metaseq`, or of the same names.
        settings: The same, or none.

    Raises:
        CheckpointError: Neither the shapes nor the settings say how many heads there are, or
            whether the missing final norm is meant to be missing.
    """
    tensors = checkpoint.tensors
    decoder = "model.decoder"
    advice = "put the model's config.json beside it"
    try:
        (vocab, embed), (rows, hidden), (ffn, _) = (
            tensors[f"{decoder}.{name}.weight"].shape
            for name in ("embed_tokens", "embed_positions", "layers.0.fc1")
        )
    except (KeyError, ValueError):
        raise CheckpointError(f"{checkpoint.folder}: no OPT decoder in it; {advice}") from None
    layers = 0
    while f"{decoder}.layers.{layers}.fc1.weight" in tensors:
        layers += 1
    known = {
        (p.get("hidden_size"), p.get("num_hidden_layers")): p.get("num_attention_heads")
        for p in PRESETS.values()
    }
    heads = settings.get("decoder_attention_heads", known.get((hidden, layers)))
    if heads is None:
        raise CheckpointError(f"{checkpoint.folder}: nothing says how many heads; {advice}")
    pre_ln = f"{decoder}.final_layer_norm.weight" in tensors
    if not pre_ln and embed == hidden and settings.get("decoder_normalize_before", True):
        raise CheckpointError(
            f"{checkpoint.folder}: no decoder.layer_norm: conversions before June 2022 lost it; "
            f"get the weights again, or {advice}"
        )
    return OPTConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        ffn_dim=ffn,
        max_position_embeddings=rows - POSITION_OFFSET,
        word_embed_proj_dim=embed,
        do_layer_norm_before=pre_ln,
        activation_function=str(settings.get("activation_fn", "relu")),
        enable_bias=f"{decoder}.layers.0.fc1.bias" in tensors,
        layer_norm_elementwise_affine=f"{decoder}.layers.0.final_layer_norm.weight" in tensors,
    )
