"""A model of one backend as a model of another, weights handed over one at a time."""

from importlib import import_module
from typing import Any

import numpy as np

from conversion.backends import BACKENDS, load_backend
from opt_core.checkpoints.tensors import float_dtype
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.params import param_specs
from opt_core.quantization import check_not_quantized
from opt_core.training.lora import check_merged


def to_torch(model: Any) -> Any:
    """A PyTorch model with the weights, configuration and head of any backend's model.

    Args:
        model: A model of `opt_torch`, `opt_tf` or `opt_flax`; it is left as it is.

    Raises:
        InputError: It is no model of these.
        CheckpointError: It has adapters that are not merged.
        ConfigError: It is quantised, or PyTorch is not installed.
    """
    return _rebuilt(model, "torch")


def to_tf(model: Any) -> Any:
    """A TensorFlow model with the weights, configuration and head of any backend's model.

    Args:
        model: A model of `opt_torch`, `opt_tf` or `opt_flax`; it is left as it is.

    Raises:
        InputError: It is no model of these.
        CheckpointError: It has adapters that are not merged.
        ConfigError: It is quantised, or TensorFlow is not installed.
    """
    return _rebuilt(model, "tf")


def to_flax(model: Any) -> Any:
    """A Flax model with the weights, configuration and head of any backend's model.

    Args:
        model: A model of `opt_torch`, `opt_tf` or `opt_flax`; it is left as it is.

    Raises:
        InputError: It is no model of these.
        CheckpointError: It has adapters that are not merged.
        ConfigError: It is quantised, or Flax is not installed.
    """
    return _rebuilt(model, "flax")


def _rebuilt(model: Any, backend: str) -> Any:
    module = type(model).__module__.partition(".")[0]
    mine = next((b for b in BACKENDS.values() if b.module == module), None)
    if mine is None:
        kind = f"{type(model).__module__}.{type(model).__name__}"
        raise InputError(f"model: expected one of opt_torch, opt_tf or opt_flax, received {kind}")
    check_not_quantized(model, f"to_{backend}")
    check_merged(import_module(f"{mine.module}.lora").adapters(model), f"to_{backend}")
    name = type(model).__name__.removeprefix(mine.prefix)
    wanted = load_backend(backend, name)
    source = import_module(f"{mine.module}.checkpoint")
    target = import_module(f"{BACKENDS[backend].module}.checkpoint")
    config = model.config
    if mine is BACKENDS["torch"] and not _is_tied(source, model):
        config = config.replace(tie_word_embeddings=False)
    # Every backend hands over the canonical layout and takes it; some as arrays of their own.
    as_array = getattr(source, "as_array", np.asarray)
    as_own = getattr(target, "as_tensor", np.asarray)
    new: Any = None
    for spec in param_specs(config, model.head):
        array = as_array(source.get_parameter(model, spec))
        if new is None:
            new = _empty(wanted, backend, target, config, array.dtype.name)
        target.set_parameter(new, spec, as_own(array.copy()))
    if backend == "torch":
        target.tie(new)
    new.generation_config = model.generation_config
    return new


def _is_tied(checkpoint: Any, model: Any) -> bool:
    return (
        model.head != "causal_lm"
        or not model.config.tie_word_embeddings
        or checkpoint.is_tied(model)
    )


def _empty(wanted: Any, backend: str, checkpoint: Any, config: OPTConfig, dtype: str) -> Any:
    """A model whose parameters wait for their values."""
    if backend == "tf":
        return wanted(config, seed=None, dtype=dtype)
    model = wanted(config, seed=None)
    if backend == "flax":
        checkpoint.init_abstract(model, float_dtype(dtype))
    return model
