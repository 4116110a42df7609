"""Weights in and out of a model, through the parameter list and the torch dialect."""

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from opt_core.checkpoints import pretrained
from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.offload import make_read_ahead, stays_in_file
from opt_core.checkpoints.save import INDEX_FILE
from opt_core.compatibility.saving import SaveOptions
from opt_core.compatibility.subclasses import is_own_class, make_model
from opt_core.errors import CheckpointError, ConfigError
from opt_core.initialization import initial_value
from opt_core.json_files import read_json, write_json
from opt_core.machine import available_memory
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import QuantizedTensor, is_quantized
from opt_core.training.lora import check_merged
from opt_torch import attention, distribution, quantization, sharding
from opt_torch import offload as offloading
from opt_torch.quantization import QuantizedLinear, QuantizedWeight

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel

M = TypeVar("M", bound="OPTPreTrainedModel")


def initialize(model: "OPTPreTrainedModel", seed: int) -> None:
    """Gives every parameter its starting value, float32 on the CPU."""
    if model.mesh is not None:
        distribution.materialize(model, model.mesh, torch.get_default_dtype())
    for spec in param_specs(model.config, model.head):
        set_parameter(model, spec, torch.from_numpy(initial_value(spec, model.config, seed)))
    tie(model)


def from_pretrained(
    cls: type[M],
    path_or_hub_id: str | PathLike[str] | None,
    dtype: str | torch.dtype | None,
    device: str | torch.device,
    attn_implementation: str | None,
    progress: Callable[[int, int], None] | None,
    config: Any,
    quantize: str | None,
    mesh: DeviceMesh | None,
    offload: bool | str,
    **arguments: Any,
) -> Any:
    """Loads a checkpoint tensor by tensor; see `OPTPreTrainedModel.from_pretrained`."""
    if quantize is not None and mesh is not None:
        raise ConfigError(f"quantize: expected None with mesh, received {quantize!r}")
    sharding.check_mesh(mesh)
    source = pretrained.open_pretrained(
        cls.head, path_or_hub_id, dtype, config, quantize, as_array=as_array, offload=offload,
        has_own_layers=is_own_class(cls), **arguments,
    )  # fmt: skip
    wanted = getattr(torch, source.dtype)
    if mesh is None:
        target = check_device(source.device or device)
    else:
        source.check_place("mesh=")
        target = sharding.mesh_device(mesh)
    if attn_implementation == "flash_attention_2":
        attention.check_flash(target, wanted)
    available = available_memory()
    stays = source.must_offload(_obstacle(source, target, mesh), available)
    model = make_model(
        cls, source.config, seed=None, attn_implementation=attn_implementation, mesh=mesh
    )
    if stays:
        offloading.prepare(model, wanted)
    if mesh is not None:
        distribution.materialize(model, mesh, wanted)
    for spec, values in source.stream(progress):
        if isinstance(values, QuantizedTensor):
            quantization.set_quantized(model, spec, values, wanted, target)
        elif stays and stays_in_file(spec):
            set_parameter(model, spec, as_tensor(values))
        else:
            own = values[distribution.own_part(spec, model)]
            cast = cast_tensor(spec.name, as_tensor(own), wanted).to(target, copy=stays)
            distribution.put_part(model, spec, cast)
            del own, cast
        del values  # or the next tensor would be read while this one is still held
    tie(model)
    model.requires_grad_(source.quantize is None and not stays)
    if stays:
        is_headed = model.head == "causal_lm"
        reader = make_read_ahead(source.plan, source.dtype, is_headed, available)
        offloading.attach(model, reader)
    if source.device is not None:
        vars(model)["hf_device_map"] = {"": "disk" if stays else target}
    return source.finish(model)


def _obstacle(
    source: pretrained.Pretrained, target: torch.device, mesh: DeviceMesh | None
) -> str | None:
    """The reason for which a model's weights cannot stay in their files, or None."""
    if source.quantize is not None:
        return f"expected quantize=None, received {source.quantize!r}"
    if mesh is not None:
        return "expected mesh=None: each process keeps its part in memory"
    if target.type != "cpu":
        return f"expected device='cpu', received '{target}'"
    return None


def check_device(device: str | torch.device) -> torch.device:
    """The device, if this machine and this build of PyTorch have it; "auto": its accelerator."""
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device: {str(device)!r} cannot be used here: {reason}") from None


def save_pretrained(model: "OPTPreTrainedModel", options: SaveOptions) -> None:
    """Writes a canonical folder; see `OPTPreTrainedModel.save_pretrained`.

    On a mesh the first process writes; the others take part in gathering, and wait until all is
    there.
    """
    check_merged(model.modules(), str(options.folder))
    dtype = str(model.dtype).removeprefix("torch.")
    if is_quantized(model):
        pretrained.save_quantized(model, options, lambda spec: get_numbers(model, spec), dtype)
        return
    config = model.config
    if model.head == "causal_lm" and config.tie_word_embeddings and not is_tied(model):
        config = config.replace(tie_word_embeddings=False)
    get = options.values(lambda spec: as_array(get_parameter(model, spec)), as_array)
    left = param_specs(config, model.head)

    def fetch(spec: ParamSpec) -> NDArray[Any]:
        """A parameter; all processes must come here in the same order."""
        assert left.pop(0) == spec
        return get(spec)

    def take_part() -> None:
        while left:
            fetch(left[0])

    team = sharding.team_of(model.mesh)

    def write() -> None:
        try:
            pretrained.save_pretrained(model, options, fetch, dtype, config)
            if not options.is_safe:
                _pickle(options.folder)
        finally:
            if team.count > 1:  # or the others would wait for it in vain
                take_part()

    team.together(write if team.is_first else take_part)


def _pickle(folder: Path) -> None:
    """Puts pytorch_model.bin, or shards of it, in the place of a folder's safetensors."""
    checkpoint, old = open_checkpoint(folder), folder / INDEX_FILE
    places = read_json(old)["weight_map"] if old.exists() else {}
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in {**checkpoint.tensors, **checkpoint.aside}.items():
        file = _pickled_name(places.get(name, "model.safetensors"))
        shards.setdefault(file, {})[name] = as_tensor(tensor.read())
    for file, tensors in shards.items():
        part = folder / f".{file}.tmp"
        torch.save(tensors, part)
        part.replace(folder / file)
    if places:
        files = {name: _pickled_name(file) for name, file in places.items()}
        index = read_json(old) | {"weight_map": files}
        write_json(folder / "pytorch_model.bin.index.json", index)
    for file in (*checkpoint.files, old):
        file.unlink(missing_ok=True)


def _pickled_name(file: str) -> str:
    return "pytorch_" + file.replace(".safetensors", ".bin")


def locate(model: "OPTPreTrainedModel", spec: ParamSpec) -> Any:
    """The tensor that holds a parameter, on a mesh the part of this process."""
    return distribution.sharded(model, spec)


def get_parameter(model: "OPTPreTrainedModel", spec: ParamSpec) -> Tensor:
    """A parameter's values; of a quantised one, those that it stands for."""
    weight = quantization.get_quantized(model, spec)
    if weight is not None:
        return weight.dequantize()
    part = distribution.local(locate(model, spec)).detach()
    return part if model.mesh is None else distribution.gather(model, spec, part)


def get_numbers(model: "OPTPreTrainedModel", spec: ParamSpec) -> NDArray[Any] | QuantizedTensor:
    """A parameter's values on the host; of a quantised one, the numbers that it is kept as."""
    weight = quantization.get_quantized(model, spec)
    return as_array(locate(model, spec)) if weight is None else weight.numbers()


def set_parameter(model: "OPTPreTrainedModel", spec: ParamSpec, values: Tensor) -> None:
    """Makes a tensor a parameter, without copying it; on a mesh it is cut, and copied."""
    distribution.put_part(model, spec, values[distribution.own_part(spec, model)])


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


def as_tensor(array: NDArray[Any]) -> Tensor:
    """A tensor over an array's memory; NumPy has no bfloat16 of its own, hence the detour."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def as_array(tensor: Tensor) -> NDArray[Any]:
    """An array over a tensor's memory (copied from a device); the inverse of `as_tensor`."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        return tensor.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
