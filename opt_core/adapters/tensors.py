"""The tensors of an adapter's file, by the parameter they belong to."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from opt_core.adapters.settings import CONFIG_FILE, AdapterSettings, read_settings
from opt_core.checkpoints.load import canonical_name
from opt_core.checkpoints.safetensors_format import read_safetensors
from opt_core.checkpoints.tensors import FLOAT_DTYPES, StoredTensor
from opt_core.checkpoints.torch_format import read_torch_file
from opt_core.errors import CheckpointError

WEIGHTS_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_TORCH_FILE = "adapter_model.bin"
_LORA = re.compile(r"(.+)\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)(\..+)?")
_TOKENS = re.compile(r"(.+)\.token_adapter\.trainable_tokens_delta(\.default)?")
_WRAPPERS = re.compile(r"\.(base_layer|token_adapter|modules_to_save(\.default)?)(?=\.)")
_KINDS = {
    "A": "low", "B": "high", "embedding_A": "embedding_low", "embedding_B": "embedding_high",
    "magnitude_vector": "magnitude",
}  # fmt: skip


@dataclass
class Parts:
    """The tensors of an adapter's file for one parameter; None for what it lacks.

    Attributes:
        whole: The parameter itself, in place of the model's.
        low: A, (rank, in).
        high: B, (out, rank).
        embedding_low: A of an embedding, (rank, rows).
        embedding_high: B of an embedding, (columns, rank).
        magnitude: The lengths that the rows of a linear weight have in the end; DoRA's.
        tokens: Rows in place of some of the model's.
        shift: What is added to a bias, before the scale.
    """

    whole: StoredTensor | None = None
    low: StoredTensor | None = None
    high: StoredTensor | None = None
    embedding_low: StoredTensor | None = None
    embedding_high: StoredTensor | None = None
    magnitude: StoredTensor | None = None
    tokens: StoredTensor | None = None
    shift: StoredTensor | None = None

    @property
    def has_adapter(self) -> bool:
        """Whether the parameter is the product of adapters, or has some added."""
        return self.low is not None or self.embedding_low is not None


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter folder, headers read.

    Attributes:
        settings: Its configuration.
        file: The file of its tensors.
        parts: Canonical name of a parameter -> what there is for it.
        prefix: What canonical names begin with that those of the adapter's model lack.
    """

    settings: AdapterSettings
    file: Path
    parts: Mapping[str, Parts] = field(repr=False)
    prefix: str


def read_adapter(folder: Path) -> AdapterFolder:
    """Reads the configuration of an adapter folder and the header of its file.

    Args:
        folder: With adapter_config.json, and adapter_model.safetensors or adapter_model.bin.

    Raises:
        CheckpointError: Files are missing or damaged, or ask for what is not supported here.
    """
    settings = read_settings(folder)
    file = folder / WEIGHTS_FILE
    if not file.exists() and (folder / _TORCH_FILE).exists():
        file = folder / _TORCH_FILE
        stored = read_torch_file(file)
    else:
        stored = read_safetensors(file)
    parts: dict[str, Parts] = {}
    for name, tensor in stored.items():
        _file_away(file, name, tensor, parts)
    bare = any(name.startswith(f"{PREFIX}decoder.") for name in stored)
    return AdapterFolder(settings, file, parts, "model." if bare else "")


def is_adapter(path: Path) -> bool:
    """Whether a folder is an adapter's, or a file one's weights."""
    if path.is_dir():
        return (path / CONFIG_FILE).exists()
    return path.name in (WEIGHTS_FILE, _TORCH_FILE)


def _file_away(file: Path, name: str, tensor: StoredTensor, parts: dict[str, Parts]) -> None:
    """Puts a tensor where it belongs."""
    if tensor.dtype not in FLOAT_DTYPES.values():
        raise CheckpointError(f"{file}: {name}: {tensor.dtype} is no floating-point type")
    inner = name.removeprefix(PREFIX)
    if ".original_module." in inner:  # what `modules_to_save` replaced
        return
    if match := _LORA.fullmatch(inner):
        kind, leaf = _KINDS[match[2]], (match[3] or "").removeprefix(".default")
        if leaf == ".bias" and kind == "high":
            owner, kind = _canonical(match[1], "bias"), "shift"
        elif leaf in ("", ".weight"):
            owner = _canonical(match[1], "weight")
        else:
            raise _unexpected(file, name)
    elif match := _TOKENS.fullmatch(inner):
        owner, kind = _canonical(match[1], "weight"), "tokens"
    else:
        owner, kind = _canonical(*inner.rsplit(".", 1)), "whole"
    part = parts.setdefault(owner, Parts())
    if ".modules_to_save." in inner and part.whole is not None:
        return  # PEFT writes such a module twice where it also saves the embeddings
    setattr(part, kind, tensor)


def _canonical(module: str, leaf: str = "") -> str:
    name = _WRAPPERS.sub("", f"{module}.{leaf}")
    return canonical_name(name) or name


def _unexpected(file: Path, name: str) -> CheckpointError:
    return CheckpointError(f"{file}: unexpected {name}")
