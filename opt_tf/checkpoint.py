"""Weights in and out of a model, through the parameter list and the Keras dialect."""

import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import keras
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.checkpoints import load as files
from opt_core.checkpoints.save import save_checkpoint
from opt_core.checkpoints.tensors import cast_array, float_dtype
from opt_core.config import DTYPES, OPTConfig
from opt_core.dialects import KERAS
from opt_core.errors import CheckpointError, ConfigError
from opt_core.generation.config import GenerationConfig
from opt_core.hub import resolve
from opt_core.initialization import initial_value
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import check_not_quantized, quantize_array, scheme_of
from opt_core.training.lora import UNMERGED
from opt_tf import _private, quantization

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel

M = TypeVar("M", bound="TFOPTPreTrainedModel")

_MIXED = ("mixed_bfloat16", "mixed_float16")


def initialize(model: "TFOPTPreTrainedModel", seed: int) -> None:
    """Gives every parameter its starting value."""
    for spec in param_specs(model.config, model.head):
        set_parameter(model, spec, initial_value(spec, model.config, seed))


def from_pretrained(
    cls: type[M],
    path_or_hub_id: str | PathLike[str],
    dtype: Any,
    attn_implementation: str,
    progress: Callable[[int, int], None] | None,
    config: OPTConfig | None,
    quantize: str | None,
    **hub: Any,
) -> M:
    """Loads a checkpoint tensor by tensor; see `TFOPTPreTrainedModel.from_pretrained`."""
    dtype = getattr(dtype, "name", dtype)  # tf.bfloat16, or a policy of Keras
    if dtype not in (*DTYPES, *_MIXED, "auto"):
        names = ", ".join((*DTYPES, *_MIXED))
        raise ConfigError(f"dtype: expected one of {names} or auto, received {dtype!r}")
    folder = resolve(path_or_hub_id, **hub)
    home = folder if folder.is_dir() else folder.parent
    config = config or OPTConfig.from_pretrained(home)
    plan = files.plan_load(files.open_checkpoint(folder), config, cls.head)
    policy = keras.dtype_policies.get(resolve_dtype(dtype, plan))
    model = cls(plan.config, None, attn_implementation, quantize, dtype=policy)
    for spec, array in plan.stream(progress=progress):
        set_parameter(model, spec, array)
        del array  # or the next tensor would be read while this one is still held
    for spec in plan.fresh:
        set_parameter(model, spec, initial_value(spec, plan.config, seed=0))
        warnings.warn(
            f"{folder}: no {spec.name} in this checkpoint; "
            "it is freshly initialised and needs training",
            stacklevel=3,
        )
    if cls.head == "causal_lm" and (home / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(home)
    return model


def save_pretrained(
    model: "TFOPTPreTrainedModel", folder: str | PathLike[str], max_shard_size: str | int
) -> None:
    """Writes a canonical folder; see `TFOPTPreTrainedModel.save_pretrained`."""
    check_not_quantized(model, "save_pretrained")
    if any(getattr(layer, "adapts", False) for layer in _private.sublayers(model)):
        raise CheckpointError(f"{folder}: {UNMERGED}")
    specs = param_specs(model.config, model.head)
    save_checkpoint(
        Path(folder),
        model.config,
        {spec.name: lambda spec=spec: get_parameter(model, spec) for spec in specs},
        specs,
        dtype=model.variable_dtype,
        max_shard_size=max_shard_size,
        architecture=type(model).__name__.removeprefix("TF"),
    )
    model.generation_config.save_pretrained(folder)


def locate(model: "TFOPTPreTrainedModel", spec: ParamSpec) -> keras.Variable:
    """The variable that holds a parameter."""
    path = KERAS.path(spec)
    if model.head == "none":
        path = path[1:]  # a bare TFOPTModel is what the others keep as `model`
    found: Any = model
    for name in path:
        found = found[int(name)] if name.isdigit() else getattr(found, name)
    return found


def get_parameter(model: "TFOPTPreTrainedModel", spec: ParamSpec) -> NDArray[Any]:
    """A parameter's values, in the canonical layout; of a quantised one, what it stands for."""
    weight = quantization.get_quantized(model, spec)
    if weight is not None:
        return weight.dequantize().numpy()
    return locate(model, spec).numpy()


def set_parameter(model: "TFOPTPreTrainedModel", spec: ParamSpec, values: NDArray[Any]) -> None:
    """Gives a parameter values in the canonical layout, cast to the variable's type."""
    scheme = scheme_of(spec, model.quantized)
    if scheme is not None:
        quantization.set_quantized(model, spec, quantize_array(spec.name, values, scheme))
        return
    variable = locate(model, spec)
    values = cast_array(spec.name, values, float_dtype(variable.dtype))
    variable.assign(tf.constant(values))


def resolve_dtype(dtype: str, plan: files.LoadPlan) -> str:
    """The type, or Keras' policy, to load as; "auto" is the stored type."""
    return plan.entries[0][1].dtype.name if dtype == "auto" else dtype
