"""Weights in and out of a model, through the parameter list and the torch dialect."""

import warnings
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opt_core.checkpoints import load as files
from opt_core.checkpoints.save import save_checkpoint
from opt_core.config import DTYPES, OPTConfig
from opt_core.dialects import TORCH
from opt_core.errors import CheckpointError, ConfigError
from opt_core.generation.config import GenerationConfig
from opt_core.hub import resolve
from opt_core.initialization import initial_value
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import check_not_quantized, check_scheme, quantize_array, scheme_of
from opt_core.training.lora import UNMERGED
from opt_torch import attention, quantization
from opt_torch.quantization import QuantizedLinear, QuantizedWeight

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel

M = TypeVar("M", bound="OPTPreTrainedModel")


def initialize(model: "OPTPreTrainedModel", seed: int) -> None:
    """Gives every parameter its starting value, float32 on the CPU."""
    for spec in param_specs(model.config, model.head):
        set_parameter(model, spec, torch.from_numpy(initial_value(spec, model.config, seed)))
    tie(model)


def from_pretrained(
    cls: type[M],
    path_or_hub_id: str | PathLike[str],
    dtype: str | torch.dtype,
    device: str | torch.device,
    attn_implementation: str,
    progress: Callable[[int, int], None] | None,
    config: OPTConfig | None,
    quantize: str | None,
    **hub: Any,
) -> M:
    """Loads a checkpoint tensor by tensor; see `OPTPreTrainedModel.from_pretrained`."""
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in (*DTYPES, "auto"):
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)} or auto, received {dtype!r}")
    check_scheme(quantize)
    folder = resolve(path_or_hub_id, **hub)
    home = folder if folder.is_dir() else folder.parent
    config = config or OPTConfig.from_pretrained(home)
    plan = files.plan_load(files.open_checkpoint(folder), config, cls.head)
    target, wanted = check_device(device), resolve_dtype(dtype, plan)
    if attn_implementation == "flash_attention_2":
        attention.check_flash(target, wanted)
    model = cls(plan.config, seed=None, attn_implementation=attn_implementation)
    for spec, array in plan.stream(progress=progress):
        scheme = scheme_of(spec, quantize)
        if scheme is None:
            values = cast_tensor(spec.name, as_tensor(array), wanted)
            set_parameter(model, spec, values.to(target))
        else:
            values = quantize_array(spec.name, array, scheme)
            quantization.set_quantized(model, spec, values, wanted, target)
        del array, values  # or the next tensor would be read while this one is still held
    for spec in plan.fresh:
        value = torch.from_numpy(initial_value(spec, plan.config, seed=0))
        set_parameter(model, spec, value.to(target, wanted))
        warnings.warn(
            f"{folder}: no {spec.name} in this checkpoint; "
            "it is freshly initialised and needs training",
            stacklevel=3,
        )
    tie(model)
    model.requires_grad_(quantize is None)
    if cls.head == "causal_lm" and (home / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(home)
    return model


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine and this build of PyTorch have it."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: {str(device)!r} cannot be used here: {reason}") from None


def save_pretrained(
    model: "OPTPreTrainedModel", folder: str | PathLike[str], max_shard_size: str | int
) -> None:
    """Writes a canonical folder; see `OPTPreTrainedModel.save_pretrained`."""
    check_not_quantized(model, "save_pretrained")
    if any(getattr(module, "adapts", False) for module in model.modules()):
        raise CheckpointError(f"{folder}: {UNMERGED}")
    config = model.config
    if model.head == "causal_lm" and config.tie_word_embeddings and not is_tied(model):
        config = config.replace(tie_word_embeddings=False)
    specs = param_specs(config, model.head)
    save_checkpoint(
        Path(folder),
        config,
        {spec.name: lambda spec=spec: as_array(get_parameter(model, spec)) for spec in specs},
        specs,
        dtype=str(model.dtype).removeprefix("torch."),
        max_shard_size=max_shard_size,
        architecture=type(model).__name__,
    )
    model.generation_config.save_pretrained(folder)


def locate(model: "OPTPreTrainedModel", spec: ParamSpec) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and the parameter's name there."""
    path = TORCH.path(spec)
    if model.head == "none":
        path = path[1:]  # a bare OPTModel is what the others keep as `model`
    return model.get_submodule(".".join(path[:-1])), path[-1]


def get_parameter(model: "OPTPreTrainedModel", spec: ParamSpec) -> Tensor:
    """A parameter's values; of a quantised one, those that it stands for."""
    weight = quantization.get_quantized(model, spec)
    if weight is not None:
        return weight.dequantize()
    module, leaf = locate(model, spec)
    return getattr(module, leaf).detach()


def set_parameter(model: "OPTPreTrainedModel", spec: ParamSpec, values: Tensor) -> None:
    """Makes a tensor a parameter, without copying it."""
    module, leaf = locate(model, spec)
    setattr(module, leaf, nn.Parameter(values))


def tie(model: "OPTPreTrainedModel") -> None:
    """Makes a tied language-model head the token embedding itself."""
    if model.head == "causal_lm" and model.config.tie_word_embeddings:
        weight = model.get_decoder().embed_tokens.weight
        if isinstance(weight, QuantizedWeight):
            model.add_module("lm_head", QuantizedLinear(weight, None).eval())
        else:
            model.get_submodule("lm_head").weight = weight


def is_tied(model: "OPTPreTrainedModel") -> bool:
    """Whether the language-model head still is the token embedding, and was not replaced."""
    return model.get_submodule("lm_head").weight is model.get_decoder().embed_tokens.weight


def cast_tensor(name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another type; itself if it has it.

    Raises:
        CheckpointError: A finite value is out of float16's range.
    """
    cast = values.to(dtype)
    if dtype == torch.float16 and values.dtype != dtype and not torch.isfinite(cast).all():
        raise CheckpointError(
            f"{name}: values beyond the range of float16; load it as bfloat16 or float32"
        )
    return cast


def resolve_dtype(dtype: str, plan: files.LoadPlan) -> torch.dtype:
    """The type to load as; "auto" is the stored one."""
    stored = plan.entries[0][1].dtype.name
    return getattr(torch, stored if dtype == "auto" else dtype)


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor over an array's memory; NumPy has no bfloat16 of its own, hence the detour."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """An array over a tensor's memory (copied from a device); the inverse of `as_tensor`."""
    tensor = tensor.cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
