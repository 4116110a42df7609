"""Layers that a class of a user's own adds to a model, in and out of files."""

from collections.abc import Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from opt_core.checkpoints.load import canonical_name
from opt_core.dialects import TORCH
from opt_core.params import param_specs
from opt_torch import _private, checkpoint


class OwnLayers:
    """Finds and fills what is none of OPT's parameters, for `opt_core.compatibility.subclasses`."""

    def _own_tensors(self: Any) -> dict[str, Tensor]:
        owners = [TORCH.owner(self, spec)[0] for spec in param_specs(self.config, self.head)]
        owners.append(self.get_output_embeddings() or owners[0])  # a tied head is in no list
        known = {id(part) for owner in owners for part in owner.modules()}
        found: dict[str, Tensor] = {}
        for path, module in self.named_modules():
            if id(module) not in known:
                own = {**dict(module.named_parameters(recurse=False)), **_private.kept(module)}
                found |= {f"{path}.{name}".lstrip("."): tensor for name, tensor in own.items()}
        return found

    def _own_array(self, tensor: Tensor) -> NDArray[Any]:
        return checkpoint.as_array(tensor)

    def _build_own(self) -> None:
        """Nothing: PyTorch's layers are complete when they are made."""

    @torch.no_grad()
    def _put_own(self: Any, values: Mapping[str, NDArray[Any]]) -> None:
        for name, tensor in self._own_tensors().items():
            array = values.get(str(canonical_name(name)))
            new = tensor.data if array is None else checkpoint.as_tensor(array.copy())
            dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
            tensor.data = new.to(self.device, dtype)
