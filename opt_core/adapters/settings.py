"""adapter_config.json: the settings that change numbers, and those that are refused by name."""

import json
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from opt_core.errors import CheckpointError
from opt_core.json_files import read_json

CONFIG_FILE = "adapter_config.json"

Initialization = Literal["kept", "pissa", "olora"]
"""The way the adapter was made: the weight under it was kept, or a part was taken away from it."""

_KEPT = ("gaussian", "orthogonal", "eva", "mica")
_REFUSED = (
    "alora_invocation_tokens", "arrow_config", "enable_lora", "kasa_config", "layer_replication",
    "megatron_config", "monteclora_config", "use_bdlora",
)  # fmt: skip
_READ = (
    "alpha_pattern", "base_model_name_or_path", "bias", "ensure_weight_tying",
    "exclude_modules", "init_lora_weights",
    "layers_pattern", "layers_to_transform", "lora_alpha", "modules_to_save", "peft_type", "r",
    "rank_pattern", "revision", "target_modules", "target_parameters", "task_type",
    "trainable_token_indices", "use_dora", "use_qalora", "use_rslora",
)  # fmt: skip
_WITHOUT_EFFECT = (
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_bias", "lora_dropout", "lora_ga_config",
    "megatron_core", "merge_weights", "peft_version", "qalora_group_size", "runtime_config",
    "velora_config",
)  # fmt: skip
"""Settings of training, and those that the tensors repeat."""


@dataclass(frozen=True)
class AdapterSettings:
    """The configuration of an adapter; PEFT's names and meanings.

    Attributes:
        path: The file.
        r: Rank, where `rank_pattern` gives no other.
        lora_alpha: Numerator of the scale, where `alpha_pattern` gives no other.
        rank_pattern: Pattern of a layer's name -> its rank.
        alpha_pattern: Pattern of a layer's name -> its alpha.
        use_rslora: Divide alpha by the root of the rank.
        use_dora: The layers have lengths of rows of their own.
        use_qalora: The adapters may have been trained on averaged inputs.
        target_modules: Names of layers, one regular expression for them, or None for PEFT's choice.
        exclude_modules: Layers that are none of them, likewise.
        layers_to_transform: Indices of the blocks with adapters; None: all.
        layers_pattern: What a list of blocks is called; empty: anything.
        target_parameters: Names of weights with adapters.
        modules_to_save: Names of modules that were trained as a whole.
        ensure_weight_tying: What is done to the token embedding is done to a tied head too.
        token_indices: Name of a layer -> rows of it that were trained; "": the token embedding.
        initialization: What making the adapter did to the weights under it.
        base: Name or path of the model that the adapter belongs to; empty if it does not say.
        revision: The model's revision on the hub.
        task_type: As PEFT calls it, such as "CAUSAL_LM"; empty if it does not say.
    """

    path: Path
    r: int
    lora_alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    use_qalora: bool
    target_modules: str | tuple[str, ...] | None
    exclude_modules: str | tuple[str, ...]
    layers_to_transform: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    target_parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    ensure_weight_tying: bool
    token_indices: Mapping[str, tuple[int, ...]]
    initialization: Initialization
    base: str
    revision: str | None
    task_type: str

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Rank of the adapter of a layer, and the factor that its product is multiplied by.

        Args:
            name: The layer's name in the model that the adapter was trained on.
        """
        rank = self._find(self.rank_pattern, name, self.r)
        alpha = self._find(self.alpha_pattern, name, self.lora_alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _find(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        found = (v for key, v in patterns.items() if re.match(rf"(.*\.)?({key})$", name))
        return next(found, default)


def read_settings(folder: Path) -> AdapterSettings:
    """Reads the settings of an adapter folder.

    Raises:
        CheckpointError: The file is missing or malformed, or asks for what is not supported here.
    """
    path = folder / CONFIG_FILE
    about = read_json(path, CheckpointError)
    kind, bias = about.get("peft_type"), about.get("bias") or "none"
    if kind != "LORA":
        raise CheckpointError(
            f"{path}: peft_type: expected 'LORA', found {kind!r}; merge the adapter with PEFT "
            "(merge_and_unload) and save the model"
        )
    if bias not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{path}: bias: expected none, all or lora_only, found {bias!r}")
    for name in _REFUSED:
        if about.get(name):
            raise CheckpointError(
                f"{path}: {name}={json.dumps(about[name])} is not supported; merge the adapter "
                "with PEFT (merge_and_unload) and save the model"
            )
    _warn_of_unknown(path, about)
    read = _Reader(path, about)
    layers = about.get("layers_to_transform")
    return AdapterSettings(
        path,
        r=read.rank("r", about.get("r", 8)),
        lora_alpha=read.number("lora_alpha", about.get("lora_alpha", 8)),
        rank_pattern=read.pattern("rank_pattern", read.rank),
        alpha_pattern=read.pattern("alpha_pattern", read.number),
        use_rslora=read.flag("use_rslora"),
        use_dora=read.flag("use_dora"),
        use_qalora=read.flag("use_qalora"),
        target_modules=read.target_modules(),
        exclude_modules=read.rule("exclude_modules"),
        layers_to_transform=read.indices("layers_to_transform", layers) or None,
        layers_pattern=read.expressions("layers_pattern"),
        target_parameters=read.names("target_parameters"),
        modules_to_save=read.expressions("modules_to_save"),
        ensure_weight_tying=read.flag("ensure_weight_tying"),
        token_indices=read.token_indices(),
        initialization=_initialization(path, about.get("init_lora_weights", True)),
        base=str(about.get("base_model_name_or_path") or ""),
        revision=about.get("revision") or None,
        task_type=str(about.get("task_type") or ""),
    )


def _warn_of_unknown(path: Path, about: Mapping[str, Any]) -> None:
    known = (*_READ, *_WITHOUT_EFFECT, *_REFUSED)
    unknown = sorted(key for key, value in about.items() if value and key not in known)
    if unknown:
        warnings.warn(
            f"{path}: {', '.join(unknown)}: unknown here and without effect, as in PEFT 0.21",
            stacklevel=4,
        )


def _initialization(path: Path, value: Any) -> Initialization:
    name = value.lower() if isinstance(value, str) else ""
    if not name or name in _KEPT:
        return "kept"
    if name in ("pissa", "olora"):
        return "pissa" if name == "pissa" else "olora"
    raise CheckpointError(
        f"{path}: init_lora_weights={json.dumps(value)} changed the weights of the model, and the "
        "adapter does not hold how: save it from PEFT with path_initial_model_for_weight_conversion"
        ", or merge it there (merge_and_unload) and save the model"
    )


class _Reader:
    """Values of the file in the types they should have."""

    def __init__(self, path: Path, about: Mapping[str, Any]):
        self._path, self._about = path, about

    def flag(self, name: str) -> bool:
        value = self._about.get(name)
        if value not in (None, True, False):
            raise self._failure(name, "true or false", value)
        return bool(value)

    def rank(self, name: str, value: Any) -> int:
        if type(value) is not int or value < 1:
            raise self._failure(name, "an integer >= 1", value)
        return value

    def number(self, name: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._failure(name, "a number", value)
        return float(value)

    def pattern(self, name: str, read: Callable[[str, Any], Any]) -> dict[str, Any]:
        value: Any = self._about.get(name) or {}
        if not isinstance(value, dict):
            raise self._failure(name, "an object", value)
        entries = cast("dict[str, Any]", value).items()
        return {self._expression(name, key): read(f"{name}.{key}", v) for key, v in entries}

    def names(self, name: str) -> tuple[str, ...]:
        value: Any = self._about.get(name)
        values = [value] if isinstance(value, str) else value or []
        if not isinstance(values, list) or not all(
            isinstance(entry, str) for entry in cast("list[Any]", values)
        ):
            raise self._failure(name, "a list of names", value)
        return tuple(cast("list[str]", values))

    def expressions(self, name: str) -> tuple[str, ...]:
        return tuple(self._expression(name, value) for value in self.names(name))

    def rule(self, name: str) -> str | tuple[str, ...]:
        value = self._about.get(name)
        return self._expression(name, value) if isinstance(value, str) else self.names(name)

    def target_modules(self) -> str | tuple[str, ...] | None:
        if self._about.get("target_modules") is None:
            return () if self._about.get("target_parameters") else None
        return self.rule("target_modules")

    def indices(self, name: str, value: Any) -> tuple[int, ...]:
        values: Any = [value] if isinstance(value, int) else value or []
        if not isinstance(values, list) or not all(
            type(entry) is int and entry >= 0 for entry in cast("list[Any]", values)
        ):
            raise self._failure(name, "a list of integers", value)
        return tuple(cast("list[int]", values))

    def token_indices(self) -> dict[str, tuple[int, ...]]:
        name = "trainable_token_indices"
        value: Any = self._about.get(name) or {}
        layers = cast("dict[str, Any]", value if isinstance(value, dict) else {"": value})
        return {layer: self.indices(name, rows) for layer, rows in layers.items()}

    def _expression(self, name: str, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise self._failure(name, f"a regular expression ({error})", value) from None
        return value

    def _failure(self, name: str, expected: str, value: Any) -> CheckpointError:
        return CheckpointError(f"{self._path}: {name}: expected {expected}, found {value!r}")
