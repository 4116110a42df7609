"""KerasHub's OPT: the .weights.h5 of Keras 3 and the folder of a preset, read and written.

Variables are numbered within their layer (0 is the kernel or gamma, 1 the bias or beta), attention
kernels have a dimension for the heads, and the position table lacks its first two rows, which
belong to no position. What we write keeps those rows beside the layers, where Keras does not look.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from conversion.formats.hdf5 import read_hdf5
from conversion.formats.hdf5_writer import write_hdf5
from conversion.streaming.lazy_tensors import JoinedTensor, MemoryTensor, joined, transposed
from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.checkpoints.tensors import LazyTensor, StoredTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, ConfigError
from opt_core.json_files import read_json, write_json
from opt_core.params import POSITION_OFFSET, ParamSpec

_OFFSET_ROWS = "opt_lm/position_rows"
_EMBEDDINGS = "token_and_position_embedding"
_POSITIONS = "model.decoder.embed_positions.weight"
# Keras' name of a layer's part -> ours. Older Keras versions put "_" before a layer's name.
_PARTS = {
    "_self_attention_layer/query_dense": "self_attn.q_proj",
    "_self_attention_layer/key_dense": "self_attn.k_proj",
    "_self_attention_layer/value_dense": "self_attn.v_proj",
    "_self_attention_layer/output_dense": "self_attn.out_proj",
    "_self_attention_layer_norm": "self_attn_layer_norm",
    "_feedforward_intermediate_dense": "fc1",
    "_feedforward_output_dense": "fc2",
    "_feedforward_layer_norm": "final_layer_norm",
}
_KERAS_PARTS = {ours: keras for keras, ours in _PARTS.items()}
_LAYER = re.compile(r"transformer_decoder(?:_(\d+))?/(.+)/vars/([01])")
_TOP_LEVEL = {
    f"{_EMBEDDINGS}/token_embedding/vars/0": "embed_tokens.weight",
    f"{_EMBEDDINGS}/position_embedding/vars/0": "embed_positions.weight",
    "layer_normalization/vars/0": "final_layer_norm.weight",
    "layer_normalization/vars/1": "final_layer_norm.bias",
}
_HEADS = re.compile(r"(query|key|value)_dense/vars/0$")


def read_keras_hub(path: Path) -> Mapping[str, LazyTensor]:
    """Reads the header of a .weights.h5 of an OPT backbone, or of a task with one in it.

    Args:
        path: The file.

    Returns:
        Canonical name -> the tensor in the canonical layout. The first two rows of the position
        table, which KerasHub does not keep, are zero.

    Raises:
        CheckpointError: The file is missing or damaged, or holds another model.
    """
    found: dict[str, LazyTensor] = {}
    rows: LazyTensor | None = None
    for name, stored in read_hdf5(path).items():
        if name == _OFFSET_ROWS:
            rows = stored
        elif not name.startswith("optimizer/"):
            canonical, tensor = _canonical(name, stored)
            if canonical in found:
                raise CheckpointError(f"{path}: {canonical!r} is there twice, as {name!r} too")
            found[canonical] = tensor
    positions = found.get(_POSITIONS)
    if positions is not None and len(positions.shape) == 2:
        if rows is None:
            shape = (POSITION_OFFSET, positions.shape[1])
            if shape[1] >= 1 << 20:
                raise CheckpointError(f"{path}: a position table of {shape[1]} columns")
            rows = MemoryTensor(_POSITIONS, np.zeros(shape, positions.dtype), path)
        length = rows.shape[0] + positions.shape[0]
        found[_POSITIONS] = joined(_POSITIONS, (length, positions.shape[1]), [rows, positions])
    return found


def has_offset_rows(tensors: Mapping[str, LazyTensor]) -> bool:
    """Whether the rows in front of position 0 were in the file: only `write_keras_hub` has them."""
    positions = tensors.get(_POSITIONS)
    parts = positions.parts if isinstance(positions, JoinedTensor) else ()
    return not any(isinstance(part, MemoryTensor) for part in parts)


def _canonical(name: str, stored: StoredTensor) -> tuple[str, LazyTensor]:
    key = re.sub(r"^(?:.*/)?layers/", "", name)  # a task has the backbone among its layers
    if key in _TOP_LEVEL:
        return f"model.decoder.{_TOP_LEVEL[key]}", stored
    match = _LAYER.fullmatch(key)
    part = match and _PARTS.get(f"_{match[2]}".replace("__", "_").replace("/_", "/"))
    if not match or not part:
        return name, stored  # reported as unexpected when it is compared with the configuration
    leaf = "bias" if match[3] == "1" else "weight"
    tensor: LazyTensor = stored
    shape = stored.shape
    if leaf == "bias" and len(shape) == 2:  # one per head
        tensor = replace(stored, shape=(shape[0] * shape[1],))
    elif leaf == "weight" and len(shape) in (2, 3):
        if len(shape) == 3 and part.endswith("out_proj"):
            stored = replace(stored, shape=(shape[0] * shape[1], shape[2]))
        elif len(shape) == 3:
            stored = replace(stored, shape=(shape[0], shape[1] * shape[2]))
        tensor = transposed(stored)
    return f"model.decoder.layers.{int(match[1] or 0)}.{part}.{leaf}", tensor


def keras_hub_config(folder: Path, weights: Sequence[Path]) -> OPTConfig:
    """The configuration of a preset's config.json, or of the weights' shapes where there is none.

    Args:
        folder: Where config.json may be; one that `transformers` wrote is taken as it is.
        weights: The .weights.h5, or its shards.

    Raises:
        ConfigError: The file describes another model, or is damaged.
        CheckpointError: The weights are those of another model.
    """
    path = folder / "config.json"
    values = read_json(path) if path.exists() else None
    if values is not None and "class_name" not in values:
        return OPTConfig.from_dict(values, str(path))
    if values is None:
        return _config_of_shapes(weights)
    kind, fields = values["class_name"], values.get("config")
    if kind == "OPTCausalLM" and isinstance(fields, dict):  # a task: its backbone is inside
        backbone: Any = cast(dict[str, Any], fields).get("backbone")
        kind, fields = "OPTBackbone", backbone.get("config") if isinstance(backbone, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType]
    if kind != "OPTBackbone" or not isinstance(fields, dict):
        raise ConfigError(
            f"{path}: expected KerasHub's OPTBackbone with a config, received {kind!r}"
        )
    given = cast(dict[str, Any], fields)
    names = {
        "vocab_size": "vocabulary_size",
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "hidden_size": "hidden_dim",
        "ffn_dim": "intermediate_dim",
        "max_position_embeddings": "max_sequence_length",
    }
    if missing := [keras for keras in names.values() if keras not in given]:
        raise ConfigError(f"{path}: no {', '.join(missing)}")
    fixed = {ours: given[keras] for ours, keras in names.items()}
    return OPTConfig.from_dict({**fixed, "dropout": given.get("dropout", 0.1)}, str(path))


def _config_of_shapes(weights: Sequence[Path]) -> OPTConfig:
    stored = {name: tensor for path in weights for name, tensor in read_hdf5(path).items()}
    heads = {t.shape[1] for name, t in stored.items() if _HEADS.search(name) and t.shape[1:]}
    tensors = {name: tensor for path in weights for name, tensor in read_keras_hub(path).items()}
    layers = sum(name.endswith(".fc1.weight") for name in tensors)
    try:
        (vocab, hidden), (rows, _), (ffn, _) = (
            tensors[f"model.decoder.{name}.weight"].shape
            for name in ("embed_tokens", "embed_positions", "layers.0.fc1")
        )
        (head_count,) = heads
    except (KeyError, ValueError):
        raise CheckpointError(f"{weights[0]}: no OPT decoder in it; expected KerasHub's") from None
    return OPTConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=head_count,
        ffn_dim=ffn,
        max_position_embeddings=rows - POSITION_OFFSET,
    )


def check_keras_hub(config: OPTConfig, specs: Iterable[ParamSpec]) -> None:
    """Says what of a model KerasHub's OPT has no place for.

    Raises:
        ConfigError: There is something.
    """
    problems = {
        "post-LN": not config.do_layer_norm_before,
        "a removed final norm": config.do_layer_norm_before and not config.has_final_layer_norm,
        "embedding projections": config.has_projections,
        f"the activation {config.activation_function}": config.activation_function != "relu",
        "linear layers without bias": not config.enable_bias,
        "norms without weights": not config.layer_norm_elementwise_affine,
    }
    problems |= {spec.name: True for spec in specs if not spec.name.startswith("model.")}
    if found := [what for what, there in problems.items() if there]:
        raise ConfigError(f"KerasHub's OPT cannot hold this model: it has no {', no '.join(found)}")


def keras_hub_tensors(
    config: OPTConfig, entries: Iterable[tuple[ParamSpec, LazyTensor]]
) -> Iterator[tuple[str, LazyTensor]]:
    """KerasHub's names, and each tensor in its layout."""
    heads = (config.num_attention_heads, config.head_dim)
    for spec, tensor in entries:
        keys = spec.name.removeprefix("model.decoder.").split(".")
        alone = next((k for k, ours in _TOP_LEVEL.items() if ours == ".".join(keys)), None)
        if spec.name == _POSITIONS:
            yield _OFFSET_ROWS, tensor.rows(0, POSITION_OFFSET)
            tensor = tensor.rows(POSITION_OFFSET, tensor.shape[0])
        if alone is not None:
            yield f"layers/{alone}", tensor
            continue
        _, index, *part, leaf = keys
        number = "" if index == "0" else f"_{index}"
        name = f"layers/transformer_decoder{number}/{_KERAS_PARTS['.'.join(part)]}/vars"
        shape = spec.shape
        if spec.kind == "linear" and leaf == "weight":
            tensor, shape = transposed(tensor), shape[::-1]
        if part[-1] in ("q_proj", "k_proj", "v_proj"):
            shape = (*shape[:-1], *heads)
        elif part[-1] == "out_proj" and leaf == "weight":
            shape = (*heads, shape[-1])
        yield f"{name}/{int(leaf == 'bias')}", joined(spec.name, shape, [tensor])


def write_keras_hub(path: Path, tensors: Sequence[PendingTensor], config: OPTConfig) -> None:
    """Writes a preset: model.weights.h5, and the two JSON files that KerasHub reads with it.

    Args:
        path: The .weights.h5.
        tensors: From `keras_hub_tensors`.
        config: The model's configuration.

    Raises:
        CheckpointError: h5py is missing, or the disk refuses.
    """
    write_hdf5(path, tensors, lambda file, h5py: None)
    write_json(path.parent / "config.json", _keras_config(config, tensors[0].dtype.name))
    count = sum(np.prod(t.shape, dtype=np.int64) for t in tensors if t.name != _OFFSET_ROWS)
    metadata = {
        "keras_version": "3.15.1",
        "keras_hub_version": "0.32.0",
        "parameter_count": int(count),
        "tasks": ["CausalLM"],
    }
    write_json(path.parent / "metadata.json", metadata)


def _keras_config(config: OPTConfig, dtype: str) -> dict[str, Any]:
    policy = {"module": "keras", "class_name": "DTypePolicy", "registered_name": None}
    return {
        "module": "keras_hub.src.models.opt.opt_backbone",
        "class_name": "OPTBackbone",
        "config": {
            "name": "opt_backbone",
            "trainable": True,
            "dtype": {**policy, "config": {"name": dtype}},
            "vocabulary_size": config.vocab_size,
            "num_layers": config.num_hidden_layers,
            "num_heads": config.num_attention_heads,
            "hidden_dim": config.hidden_size,
            "intermediate_dim": config.ffn_dim,
            "dropout": config.dropout,
            "max_sequence_length": config.max_position_embeddings,
        },
        "registered_name": "keras_hub>OPTBackbone",
    }
