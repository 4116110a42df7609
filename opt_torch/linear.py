"""Linear layers in the layout that is fast: oneDNN's on the CPU, wherever no gradient is wanted.

PyTorch computes small float32 products on the CPU with MKL, which reads the weights at half to
three quarters of the rate oneDNN reaches; and oneDNN multiplies bfloat16 weights nearly twice as
fast once they are in its own blocked order. Packing is reversible and takes no second copy:
whatever wants the parameters themselves (a gradient, `parameters()`, `state_dict()`, `to`, a look
at `weight`) gets them back in the usual order first.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What torch.compile lowers linear layers to on the CPU; a build without oneDNN lacks them.
_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
_REORDER = getattr(torch.ops.mkldnn, "_reorder_linear_weight", None)
_DTYPES = (torch.float32, torch.bfloat16)


class Linear(nn.Linear):
    """`torch.nn.Linear`, whose weight may be packed while a model generates."""

    packed: Tensor | None = None
    """The weight in oneDNN's order; the parameter is empty then, unless it is shared."""

    def forward(self, input: Tensor) -> Tensor:
        """Computes `input @ weight.T + bias`."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or _PRODUCT is None:
            return F.linear(input, self.weight, self.bias)
        weight = self.packed
        if weight is None:
            weight = self._parameters["weight"]
            assert weight is not None
            if weight.device.type != "cpu" or weight.dtype not in _DTYPES:
                return F.linear(input, weight, self._parameters["bias"])
        return _PRODUCT(input, weight, self._parameters["bias"], "none", [], "")

    def pack(self, is_shared: bool) -> None:
        """Packs a bfloat16 weight on the CPU; does nothing where that is of no use.

        Args:
            is_shared: Whether another module reads the parameter too, so that it must stay.
        """
        weight = self._parameters["weight"]
        if self.packed is not None or weight is None or _REORDER is None:
            return
        if weight.dtype != torch.bfloat16 or weight.device.type != "cpu":
            return
        if torch.ops.mkldnn._is_mkldnn_bf16_supported():
            self.packed = _REORDER(weight.detach())
            if not is_shared:
                # The parameter itself stays, for optimizers and whoever else holds it.
                weight.data = weight.data.new_empty(0)

    def unpack(self) -> None:
        """Gives the parameter its values back, in the usual order."""
        packed, self.packed = self.packed, None
        weight = self._parameters.get("weight")
        if packed is not None and weight is not None and weight.numel() == 0:
            weight.data = packed.to_dense()

    def __getattr__(self, name: str) -> Any:
        """Looks up an attribute; the weight is unpacked before anyone sees it."""
        if name == "weight":
            self.unpack()
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a new weight makes a packed one void."""
        if name == "weight":
            self.packed = None
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: the weight in the usual order."""
        self.unpack()
        return self.__dict__.copy()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)


def pack(model: nn.Module, shared: Tensor) -> None:
    """Packs the linear layers of a model that is about to generate, one at a time.

    Args:
        model: The model.
        shared: The token embedding, which a tied head must not take away.
    """
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(is_shared=module._parameters["weight"] is shared)


def unpack(model: nn.Module) -> None:
    """Puts every weight of a model back into the usual order."""
    for module in model.modules():
        if isinstance(module, Linear):
            module.unpack()
