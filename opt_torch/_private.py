"""Everything undocumented of PyTorch that this backend uses: the rest of it imports it from here.

All of it was seen in PyTorch 2.13. An operation that a build or a version lacks is None here, a
question that cannot be asked has the answer that costs time and not correctness, and each entry
says what happens then.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

is_jit_tracing: Any = getattr(torch.jit, "is_tracing", lambda: False)
"""Whether `torch.jit.trace` is at work; without it a trace would meet oneDNN's call and end."""

mkldnn_linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
"""OneDNN's linear layer, to which torch.compile lowers; without it MKL's, which is slower."""

mkldnn_reorder: Any = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
"""A weight in oneDNN's blocked order; without it weights stay as they are, which is slower."""

_has_bfloat16: Any = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
_transforms_active: Any = getattr(torch._C, "_are_functorch_transforms_active", None)

quantize_per_channel: Any = getattr(torch, "_make_per_channel_quantized_tensor", None)
int8_prepack: Any = getattr(torch.ops.quantized, "linear_prepack", None)
int8_unpack: Any = getattr(torch.ops.quantized, "linear_unpack", None)
int8_linear: Any = getattr(
    torch.ops.quantized, "linear_with_input_q_dq_qweight_dq_output_fp32", None
)
"""FBGEMM's products in integers, which PyTorch's quantised modules call.

Without one of these four int8 weights are upcast to be multiplied, which is slower.
"""
int4_pack: Any = getattr(torch.ops.aten, "_convert_weight_to_int4pack_for_cpu", None)
int4_linear: Any = getattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu", None)
"""The CPU's kernel for int4 weights; without one of these two they are widened part by part."""

_HAS_FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines


def has_int8_linear() -> bool:
    """Whether this build of PyTorch computes in integers on the CPU."""
    return _HAS_FBGEMM and None not in (
        quantize_per_channel, int8_prepack, int8_unpack, int8_linear
    )  # fmt: skip


def has_int4_linear() -> bool:
    """Whether PyTorch has a kernel for 4-bit weights on the CPU."""
    return None not in (int4_pack, int4_linear)


def has_mkldnn_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 instructions here; unknown means no: float32 products then."""
    return _has_bfloat16 is not None and _has_bfloat16()


def is_compiling() -> bool:
    """Whether Dynamo is reading a program, not running it; unknown means yes."""
    context: Any = getattr(getattr(torch, "_guards", None), "TracingContext", None)
    return context is None or context.try_get() is not None


def overload(operation: Any) -> Callable[..., Any]:
    """An operation without its Python call, which searches the arguments for script objects.

    Without `OpOverload._op` it is the overload itself, 5 microseconds slower.
    """
    return getattr(operation.default, "_op", operation.default)


def in_transform() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation may be at work.

    Unknown means yes: the plain operations then, which all transforms know.
    """
    if _transforms_active is None or _transforms_active():
        return True
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_hooks(module: nn.Module) -> bool:
    """Whether calling a module may call hooks; unknown means yes: the model calls its modules."""
    try:
        own = module._forward_hooks or module._forward_pre_hooks
        return bool(own or nn.modules.module._has_any_global_hook())
    except AttributeError:
        return True


def has_own_hooks(module: nn.Module) -> bool:
    """Whether there are hooks on a module that are not PyTorch's own, such as FSDP's."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks)


def register_output(cls: Any) -> None:
    """Lets outputs through PyTorch's pytrees (`torch.export`, DDP, FSDP) and `torch.jit.trace`.

    Pytrees are public under no other name. Unregistered, an output is one thing to them, which they
    refuse or do not find the tensors in; and TorchScript would try to make a class of its own of
    it, where it is to be the dict it is.
    """
    torch.jit.ignore(cls)

    def flatten(output: Any) -> tuple[list[Any], list[str]]:
        return list(output.values()), list(output)

    def flatten_with_keys(output: Any) -> tuple[list[Any], list[str]]:
        keys = [(pytree.MappingKey(name), value) for name, value in output.items()]
        return keys, list(output)

    pytree.register_pytree_node(
        cls,
        flatten,
        lambda values, names: cls(zip(names, values, strict=True)),
        serialized_type_name=f"{cls.__module__}.{cls.__name__}",
        flatten_with_keys_fn=flatten_with_keys,
    )


def replace_buffer(state: dict[str, Any], name: str, value: Tensor | None) -> dict[str, Any]:
    """A module's state to copy or pickle, with another buffer; `nn.Module` keeps them so."""
    return state | {"_buffers": state["_buffers"] | {name: value}}


def kept(module: nn.Module) -> dict[str, Tensor]:
    """A module's own buffers that are saved; all of them where that cannot be told."""
    lost = getattr(module, "_non_persistent_buffers_set", ())
    return {name: b for name, b in module.named_buffers(recurse=False) if name not in lost}


def trainers_folder() -> str | None:
    """The folder that the Trainer of `transformers` is saving a model in right now, or None.

    It tells a model of another library nothing of it (seen in transformers 4.57 and 5.24); without
    these frames the weights lie there alone, and `from_pretrained` needs `config=`.
    """
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:
        name = frame.f_globals.get("__name__")
        if name == "transformers.trainer" and frame.f_code.co_name in ("_save", "save_model"):
            return frame.f_locals.get("output_dir")
    return None


def peft_step() -> tuple[str, dict[str, Any]] | None:
    """The function of PEFT, with its variables, that asks a model for its modules; else None.

    It leaves heads out of "all-linear" for the classes of `transformers` alone (seen in PEFT 0.21);
    without these frames it adapts the head too, and says of quantised layers that it knows none.
    """
    frame = sys._getframe(2)
    if frame.f_globals.get("__name__") != "peft.tuners.tuners_utils":
        return None
    return frame.f_code.co_name, frame.f_locals
