"""Low-rank adapters: their parameters, first values, and the files that PEFT reads and writes.

An adapted layer computes `W x + (alpha / rank) B A x`; A is random and B zero at first, so training
starts from the model itself (LoRA, arXiv 2106.09685). The layer keeps its name, and the adapter's
two matrices are linear layers `lora_A` and `lora_B` inside it: `opt_core.dialects` spells them.
"""

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.atomic import new_folder
from opt_core.checkpoints.safetensors_format import (
    PendingTensor,
    read_safetensors,
    write_safetensors,
)
from opt_core.checkpoints.tensors import cast_array
from opt_core.config import OPTConfig
from opt_core.dialects import Dialect
from opt_core.errors import CheckpointError, ConfigError
from opt_core.json_files import read_json, write_json
from opt_core.params import HEAD_PARAMETERS, Head, ParamSpec, param_specs

TARGETS = ("q_proj", "v_proj")
"""The layers adapted unless others are named: those of the paper, and PEFT's choice for OPT."""

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
_PREFIX = "base_model.model."
_TASKS: dict[Head, str] = {
    "none": "FEATURE_EXTRACTION",
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "question_answering": "QUESTION_ANS",
}


@dataclass(frozen=True)
class Adapter:
    """The settings of an adapter folder.

    Attributes:
        rank: Rank of A and B.
        alpha: Numerator of the scale.
        targets: The adapted layers' names.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"rank: expected an integer >= 1, received {self.rank!r}")
        check_targets(self.targets)

    @property
    def scale(self) -> float:
        """The factor that B A x is multiplied by."""
        return self.alpha / self.rank


def check_targets(targets: Sequence[str]) -> None:
    """Refuses names of layers that no adapter can be put on.

    Raises:
        ConfigError: A name is not one of the linear layers of a block, or there is none.
    """
    if not targets or any(name not in _LAYERS for name in targets):
        raise ConfigError(
            f"lora_targets: expected some of {', '.join(_LAYERS)}, "
            f"received {', '.join(map(str, targets)) or 'none'}"
        )


def check_merged(layers: Iterable[Any], action: str) -> None:
    """Refuses to take the weights of a model that do not hold what its adapters have learnt.

    Args:
        layers: The model's layers.
        action: What is refused, for the message.

    Raises:
        CheckpointError: A layer has an adapter that works beside its weight.
    """
    if any(getattr(layer, "adapts", False) for layer in layers):
        raise CheckpointError(
            f"{action}: the model has adapters: merge them first, or save them alone "
            "(lora.save_adapter)"
        )


def adapted_specs(config: OPTConfig, targets: Sequence[str]) -> list[ParamSpec]:
    """The weights that get an adapter."""
    endings = tuple(f".{name}.weight" for name in targets)
    return [spec for spec in param_specs(config, "none") if spec.name.endswith(endings)]


def adapter_specs(config: OPTConfig, rank: int, targets: Sequence[str]) -> list[ParamSpec]:
    """The adapters' parameters: A [rank, in] and B [out, rank] of every adapted weight."""
    specs: list[ParamSpec] = []
    for spec in adapted_specs(config, targets):
        layer, (out, into) = spec.name.removesuffix(".weight"), spec.shape
        a, b = (f"{layer}.{name}.weight" for name in ("lora_A", "lora_B"))
        specs.append(ParamSpec(a, (rank, into), "linear", ("rank", spec.axes[1])))
        specs.append(ParamSpec(b, (out, rank), "linear", (spec.axes[0], "rank")))
    return specs


def initial_adapter(spec: ParamSpec, seed: int) -> NDArray[np.float32]:
    """The first value of A (uniform, as PEFT draws it) or B (zero), the same in every framework."""
    if spec.name.endswith("lora_B.weight"):
        return np.zeros(spec.shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    bound = spec.shape[1] ** -0.5
    return rng.uniform(-bound, bound, spec.shape).astype(np.float32)


def initial_adapters(
    config: OPTConfig, adapter: Adapter, seed: int
) -> Iterator[tuple[ParamSpec, NDArray[np.float32]]]:
    """The adapters' parameters and their first values, one after the other."""
    for spec in adapter_specs(config, adapter.rank, adapter.targets):
        yield spec, initial_adapter(spec, seed)


def plan_adapters(
    model: Any, dialect: Dialect, adapter: Adapter, plain: type, has_some: bool
) -> list[tuple[Any, str]]:
    """Where the layers are that get an adapter: the modules that hold them, and their names there.

    Args:
        model: A backend's model.
        dialect: The backend's spelling.
        adapter: What they get.
        plain: The class of layers that can have one.
        has_some: Whether layers of the model have adapters already.

    Raises:
        ConfigError: They do, or a layer is of another class.
    """
    if has_some:
        raise ConfigError("the model has adapters already; merge them first")
    places: list[tuple[Any, str]] = []
    for spec in adapted_specs(model.config, adapter.targets):
        parent, name = dialect.parent(model, spec)
        if type(getattr(parent, name)) is not plain:
            raise ConfigError(f"{spec.name}: an adapter needs a plain linear layer")
        places.append((parent, name))
    return places


def adapter_of(layers: Sequence[Any]) -> Adapter:
    """The adapter of a model's adapted layers.

    Raises:
        ConfigError: There are no such layers.
    """
    if not layers:
        raise ConfigError("the model has no adapters to save")
    return layers[0].adapter


def load_adapter(
    model: Any,
    folder: str | PathLike[str],
    apply: Callable[..., Adapter],
    put: Callable[[Any, ParamSpec, NDArray[Any]], None],
) -> None:
    """Puts the adapters of a folder on a model, and the head that was trained with them.

    Args:
        model: A backend's model.
        folder: The folder.
        apply: The backend's `lora.apply`.
        put: Gives a parameter of the model its values, in the canonical layout.

    Raises:
        CheckpointError: As `read_adapter`.
    """
    adapter, values = read_adapter(Path(folder), model.config, model.head)
    apply(model, adapter.rank, adapter.alpha, adapter.targets)
    for spec in _trained(model.config, model.head, adapter):
        put(model, spec, values[spec.name])


def save_adapter(
    folder: str | PathLike[str],
    config: OPTConfig,
    head: Head,
    adapter: Adapter,
    fetch: Callable[[ParamSpec], NDArray[Any]],
    base: str,
) -> None:
    """Writes an adapter folder as PEFT has them; it appears whole or not at all.

    Args:
        folder: A new folder.
        config: The model's configuration.
        head: Its head; one that a language model lacks was trained too and is written as well.
        adapter: Rank, scale and targets.
        fetch: Gives the values of a parameter, in the canonical layout.
        base: Name or path of the model that the adapter belongs to.

    Raises:
        CheckpointError: The folder exists, or the disk refuses.
    """
    specs = _trained(config, head, adapter)
    heads = sorted({spec.name.partition(".")[0] for spec in _new_head(config, head)})
    about: dict[str, Any] = {
        "peft_type": "LORA", "task_type": _TASKS[head], "base_model_name_or_path": base,
        "r": adapter.rank, "lora_alpha": adapter.alpha, "target_modules": list(adapter.targets),
        "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "use_rslora": False,
        "use_dora": False, "inference_mode": True, "modules_to_save": heads or None,
    }  # fmt: skip
    dtype = np.dtype(np.float32)

    def pending(spec: ParamSpec) -> PendingTensor:
        def read() -> NDArray[Any]:
            return cast_array(spec.name, np.asarray(fetch(spec)), dtype)

        return PendingTensor(_PREFIX + spec.name, spec.shape, dtype, read)

    with new_folder(Path(folder)) as stage:
        write_safetensors(stage / WEIGHTS_FILE, [pending(spec) for spec in specs])
        write_json(stage / CONFIG_FILE, about)


def read_adapter(
    folder: Path, config: OPTConfig, head: Head
) -> tuple[Adapter, dict[str, NDArray[Any]]]:
    """Reads an adapter folder, PEFT's or ours.

    Args:
        folder: The folder.
        config: The configuration of the model that it is for.
        head: Its head.

    Returns:
        What the adapter is, and its parameters by canonical name.

    Raises:
        CheckpointError: Files are missing or damaged, need what is not supported here, or do not
            fit the model.
    """
    path = folder / CONFIG_FILE
    adapter = _adapter(read_json(path, CheckpointError), path)
    stored = read_safetensors(folder / WEIGHTS_FILE)
    wanted = {_PREFIX + spec.name: spec for spec in _trained(config, head, adapter)}
    problems = [f"missing {name}" for name in sorted(wanted.keys() - stored.keys())]
    problems += [f"unexpected {name}" for name in sorted(stored.keys() - wanted.keys())]
    problems += [
        f"{name}: expected {list(spec.shape)}, found {list(stored[name].shape)}"
        for name, spec in wanted.items()
        if name in stored and stored[name].shape != spec.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit the model: {'; '.join(problems[:4])}{more}"
        )
    return adapter, {spec.name: stored[name].read() for name, spec in wanted.items()}


def _adapter(about: Mapping[str, Any], path: Path) -> Adapter:
    expected = {"peft_type": ("LORA",), "bias": ("none", None)}
    off = ("use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern",
           "layers_to_transform", "lora_bias", "exclude_modules")  # fmt: skip
    for name, allowed in expected.items():
        if about.get(name) not in allowed:
            raise CheckpointError(
                f"{path}: {name}: expected {allowed[0]!r}, found {about.get(name)!r}"
            )
    for name in off:
        if about.get(name):
            raise CheckpointError(f"{path}: {name}={json.dumps(about[name])} is not supported")
    targets: Any = about.get("target_modules")
    if not isinstance(targets, list):
        raise CheckpointError(f"{path}: target_modules: expected a list, found {targets!r}")
    try:
        names = tuple(str(name) for name in targets)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        return Adapter(about["r"], float(about["lora_alpha"]), tuple(sorted(names)))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def _trained(config: OPTConfig, head: Head, adapter: Adapter) -> list[ParamSpec]:
    """Parameters that are trained where adapters are, and belong into their folder."""
    return [*adapter_specs(config, adapter.rank, adapter.targets), *_new_head(config, head)]


def _new_head(config: OPTConfig, head: Head) -> list[ParamSpec]:
    """Parameters of a head that the language model does not have: trained along with adapters."""
    names = HEAD_PARAMETERS[head] if head != "causal_lm" else ()
    return [spec for spec in param_specs(config, head) if spec.name in names]
