"""Weights in and out of a model, through the parameter list and the Keras dialect."""

from collections.abc import Callable
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeVar

import keras
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.checkpoints import pretrained
from opt_core.checkpoints.tensors import cast_array, float_dtype
from opt_core.compatibility.saving import SaveOptions, refuse_unsafe
from opt_core.compatibility.subclasses import is_own_class, make_model
from opt_core.config_checks import DTYPES
from opt_core.dialects import KERAS
from opt_core.initialization import initial_value
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import QuantizedTensor, is_quantized, quantize_array, scheme_of
from opt_core.training.lora import check_merged
from opt_tf import _private, quantization

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel

M = TypeVar("M", bound="TFOPTPreTrainedModel")

_DTYPES = (*DTYPES, "mixed_bfloat16", "mixed_float16")


def initialize(model: "TFOPTPreTrainedModel", seed: int) -> None:
    """Gives every parameter its starting value."""
    for spec in param_specs(model.config, model.head):
        set_parameter(model, spec, initial_value(spec, model.config, seed))


def from_pretrained(
    cls: type[M],
    path_or_hub_id: str | PathLike[str] | None,
    dtype: Any,
    attn_implementation: str | None,
    progress: Callable[[int, int], None] | None,
    config: Any,
    quantize: str | None,
    **arguments: Any,
) -> Any:
    """Loads a checkpoint tensor by tensor; see `TFOPTPreTrainedModel.from_pretrained`."""
    source = pretrained.open_pretrained(
        cls.head, path_or_hub_id, dtype, config, quantize, _DTYPES,
        has_own_layers=is_own_class(cls), **arguments,
    )  # fmt: skip
    source.check_place("tf.device")
    source.check_in_memory()
    is_default = source.dtype == keras.config.dtype_policy().name
    policy = None if is_default else keras.dtype_policies.get(source.dtype)
    model = make_model(
        cls, source.config, seed=None, attn_implementation=attn_implementation,
        quantize=source.quantize, dtype=policy,
    )  # fmt: skip
    for spec, values in source.stream(progress):
        if isinstance(values, QuantizedTensor):
            quantization.set_quantized(model, spec, values)
        else:
            set_parameter(model, spec, values)
        del values  # or the next tensor would be read while this one is still held
    return source.finish(model)


def save_pretrained(model: "TFOPTPreTrainedModel", options: SaveOptions) -> None:
    """Writes a canonical folder; see `TFOPTPreTrainedModel.save_pretrained`."""
    refuse_unsafe(options, "tf-h5")
    check_merged(_private.sublayers(model), str(options.folder))
    dtype = model.variable_dtype
    if is_quantized(model):
        pretrained.save_quantized(model, options, lambda spec: get_numbers(model, spec), dtype)
        return
    fetch = options.values(lambda spec: get_parameter(model, spec))
    pretrained.save_pretrained(model, options, fetch, dtype)
    if options.saved_model:
        model.write_saved_model(options.folder / "saved_model" / "1", options.signatures)


def locate(model: "TFOPTPreTrainedModel", spec: ParamSpec) -> keras.Variable:
    """The variable that holds a parameter."""
    return getattr(*KERAS.owner(model, spec))


def get_parameter(model: "TFOPTPreTrainedModel", spec: ParamSpec) -> NDArray[Any]:
    """A parameter's values, in the canonical layout; of a quantised one, what it stands for."""
    weight = quantization.get_quantized(model, spec)
    if weight is not None:
        return weight.dequantize().numpy()
    return locate(model, spec).numpy()


def get_numbers(model: "TFOPTPreTrainedModel", spec: ParamSpec) -> NDArray[Any] | QuantizedTensor:
    """A parameter's values on the host; of a quantised one, the numbers that it is kept as."""
    weight = quantization.get_quantized(model, spec)
    return locate(model, spec).numpy() if weight is None else weight.numbers()


def set_parameter(model: "TFOPTPreTrainedModel", spec: ParamSpec, values: NDArray[Any]) -> None:
    """Gives a parameter values in the canonical layout, cast to the variable's type."""
    scheme = scheme_of(spec, model.quantized)
    if scheme is not None:
        quantization.set_quantized(model, spec, quantize_array(spec.name, values, scheme))
        return
    variable = locate(model, spec)
    values = cast_array(spec.name, values, float_dtype(variable.dtype))
    variable.assign(tf.constant(values))
