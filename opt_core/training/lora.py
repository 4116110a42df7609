"""Low-rank adapters: their parameters, first values, and the files that PEFT reads and writes.

An adapted layer computes `W x + (alpha / rank) B A x`; A is random and B zero at first, so training
starts from the model itself (LoRA, arXiv 2106.09685). The layer keeps its name, and the adapter's
two matrices are linear layers `lora_A` and `lora_B` inside it: `opt_core.dialects` spells them.
"""

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.adapters.live import LivePlan, plan_live, set_config
from opt_core.adapters.settings import CONFIG_FILE
from opt_core.adapters.tensors import PREFIX, WEIGHTS_FILE
from opt_core.checkpoints.atomic import new_folder
from opt_core.checkpoints.safetensors_format import PendingTensor, write_safetensors
from opt_core.checkpoints.tensors import cast_array
from opt_core.config import OPTConfig
from opt_core.dialects import Dialect
from opt_core.errors import CheckpointError, ConfigError
from opt_core.json_files import write_json
from opt_core.params import HEAD_PARAMETERS, Head, ParamSpec, param_specs

TARGETS = ("q_proj", "v_proj")
"""The layers adapted unless others are named: those of the paper, and PEFT's choice for OPT."""

_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
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
        source: The folder it was read from, where it is of a form that is not written again.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...]
    source: str = ""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise ConfigError(f"rank: expected an integer >= 1, received {self.rank!r}")
        if not self.source:
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
    return [one for spec in adapted_specs(config, targets) for one in _pair(spec, rank)]


def initial_adapter(spec: ParamSpec, seed: int) -> NDArray[np.float32]:
    """The first value of A (uniform, as PEFT draws it) or B (zero), the same in every framework."""
    if spec.name.endswith("lora_B.weight"):
        return np.zeros(spec.shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    bound = spec.shape[1] ** -0.5
    return rng.uniform(-bound, bound, spec.shape).astype(np.float32)


class Hands(NamedTuple):
    """The part of a backend in this: how it handles its models.

    Attributes:
        dialect: How it spells parameters.
        plain: Its class of linear layers, and no subclass, which can have adapters.
        adapted: `adapted(layer, adapter)` makes a layer with an adapter of such a one.
        fetch: `fetch(model, spec)` gives the values of a parameter, in the canonical layout.
        put: `put(model, spec, values)` gives a parameter its values.
        fit: `fit(model)` makes room for the embeddings of the model's configuration, which has
            another vocabulary or ties the head no more; the values of both are put then.
        bare: `bare(layer)` makes a plain layer of an adapted one's sizes, without parameters.
        replace: `replace(parent, name, layer)` puts a layer in the place of another.
    """

    dialect: Dialect
    plain: type
    adapted: Callable[[Any, Adapter], Any]
    fetch: Callable[[Any, ParamSpec], NDArray[Any]]
    put: Callable[[Any, ParamSpec, NDArray[Any]], None]
    fit: Callable[[Any], None]
    bare: Callable[[Any], Any]
    replace: Callable[[Any, str, Any], None]


def apply(model: Any, adapter: Adapter, seed: int, hands: Hands) -> Adapter:
    """Puts adapters with their first values on a model.

    Args:
        model: A backend's model.
        adapter: What the layers get.
        seed: Seed of A.
        hands: The backend's.

    Raises:
        ConfigError: Layers of the model have adapters already, or are of another class.
    """
    for parent, name in _places(model, adapted_specs(model.config, adapter.targets), hands):
        hands.replace(parent, name, hands.adapted(getattr(parent, name), adapter))
    for spec in adapter_specs(model.config, adapter.rank, adapter.targets):
        hands.put(model, spec, initial_adapter(spec, seed))
    return adapter


def load_adapter(model: Any, folder: str | PathLike[str], hands: Hands) -> None:
    """Puts the adapters of a folder on a model, and whatever else was trained with them.

    Args:
        model: A backend's model.
        folder: Folder or hub id of an adapter, PEFT's or ours.
        hands: The backend's.

    Raises:
        ConfigError: Layers of the model have adapters already, or are of another class.
        CheckpointError: As `plan_live`.
    """
    plan = plan_live(model, folder, partial(hands.fetch, model))
    places = _places(model, [spec for spec, _ in plan.beside], hands)
    if plan.config != model.config:
        set_config(model, plan.config)
        hands.fit(model)
    for spec, values in plan.values():
        hands.put(model, spec, values)
    common = _common(plan, model)
    for (spec, product), (parent, name) in zip(plan.products(), places, strict=True):
        rank, scale = product.low.shape[0], product.scale
        adapter = common or Adapter(rank, scale * rank, (), str(plan.adapter.file.parent))
        hands.replace(parent, name, hands.adapted(getattr(parent, name), adapter))
        for one, values in zip(_pair(spec, rank), (product.low, product.high), strict=True):
            hands.put(model, one, values)


def unload(model: Any, hands: Hands) -> None:
    """Takes the adapters off a model.

    Args:
        model: A backend's model.
        hands: The backend's.
    """
    for parent, name, layer in _adapted(model, hands):
        plain = hands.bare(layer)
        plain.weight, plain.bias = layer.weight, layer.bias
        hands.replace(parent, name, plain)


def save_model_adapter(model: Any, folder: str | PathLike[str], base: str, hands: Hands) -> None:
    """Writes a model's adapters; see `save_adapter`.

    Args:
        model: A backend's model.
        folder: A new folder.
        base: Name or path of the model without them.
        hands: The backend's.

    Raises:
        ConfigError: There are none, or they are of a form that is not written.
    """
    adapter = _adapter_of([layer for _, _, layer in _adapted(model, hands)])
    save_adapter(folder, model.config, model.head, adapter, partial(hands.fetch, model), base)


def saved_specs(model: Any, hands: Hands) -> list[ParamSpec]:
    """The parameters that `save_model_adapter` asks for, in their order.

    Args:
        model: A backend's model.
        hands: The backend's.

    Raises:
        ConfigError: As there.
    """
    adapter = _adapter_of([layer for _, _, layer in _adapted(model, hands)])
    return _trained(model.config, model.head, adapter)


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

        return PendingTensor(PREFIX + spec.name, spec.shape, dtype, read)

    with new_folder(Path(folder)) as stage:
        write_safetensors(stage / WEIGHTS_FILE, [pending(spec) for spec in specs])
        write_json(stage / CONFIG_FILE, about)


def _trained(config: OPTConfig, head: Head, adapter: Adapter) -> list[ParamSpec]:
    """Parameters that are trained where adapters are, and belong into their folder."""
    return [*adapter_specs(config, adapter.rank, adapter.targets), *_new_head(config, head)]


def _new_head(config: OPTConfig, head: Head) -> list[ParamSpec]:
    """Parameters of a head that the language model does not have: trained along with adapters."""
    names = HEAD_PARAMETERS[head] if head != "causal_lm" else ()
    return [spec for spec in param_specs(config, head) if spec.name in names]


def _adapter_of(layers: Sequence[Any]) -> Adapter:
    """The adapter of a model's adapted layers.

    Raises:
        ConfigError: There are no such layers, or theirs are of a form that is not written.
    """
    if not layers:
        raise ConfigError("the model has no adapters to save")
    adapter: Adapter = layers[0].adapter
    if adapter.source:
        raise ConfigError(
            f"adapters read from {adapter.source} are not written again: their layers differ, or "
            "other weights go with them; copy that folder, or merge them and save the model"
        )
    return adapter


def _adapted(model: Any, hands: Hands) -> list[tuple[Any, str, Any]]:
    """The layers with adapters, each with the module that holds it and its name there."""
    linear = (spec for spec in param_specs(model.config, "none") if spec.kind == "linear")
    places = (hands.dialect.parent(model, s) for s in linear if s.name.endswith(".weight"))
    layers = ((parent, name, getattr(parent, name)) for parent, name in places)
    return [place for place in layers if hasattr(place[2], "adapts")]


def _places(model: Any, specs: Iterable[ParamSpec], hands: Hands) -> list[tuple[Any, str]]:
    """The modules that hold the layers of some weights, and the layers' names there."""
    if _adapted(model, hands):
        raise ConfigError("the model has adapters already; merge and unload them first")
    places: list[tuple[Any, str]] = []
    for spec in specs:
        parent, name = hands.dialect.parent(model, spec)
        if type(getattr(parent, name)) is not hands.plain:
            raise ConfigError(f"{spec.name}: an adapter needs a plain linear layer")
        places.append((parent, name))
    return places


def _pair(spec: ParamSpec, rank: int) -> list[ParamSpec]:
    """A [rank, in] and B [out, rank] of an adapted weight."""
    layer, (out, into) = spec.name.removesuffix(".weight"), spec.shape
    a, b = (f"{layer}.{name}.weight" for name in ("lora_A", "lora_B"))
    return [
        ParamSpec(a, (rank, into), "linear", ("rank", spec.axes[1])),
        ParamSpec(b, (out, rank), "linear", (spec.axes[0], "rank")),
    ]


def _common(plan: LivePlan, model: Any) -> Adapter | None:
    """The one adapter of all layers, if it is such as `apply` makes and nothing else changes."""
    names = {spec.name for spec, _ in plan.beside}
    targets = tuple(sorted({name.split(".")[-2] for name in names}))
    sizes = {(tensor.rank, tensor.scale) for _, tensor in plan.beside}
    heads = {spec.name for spec in _new_head(model.config, model.head)}
    if len(sizes) != 1 or any(tensor.initialization != "kept" for _, tensor in plan.beside):
        return None
    if not targets or any(name not in _LAYERS for name in targets):
        return None
    if names != {spec.name for spec in adapted_specs(model.config, targets)}:
        return None
    if {spec.name for spec, _ in plan.replaced} - heads:
        return None
    rank, scale = sizes.pop()
    return Adapter(rank, scale * rank, targets)
