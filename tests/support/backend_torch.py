"""PyTorch behind the interface of `tests.support.backends`."""

from typing import Any

import torch

from opt_core.params import Head, param_specs
from tests.support.backends import Backend
from tests.support.oracle import Array


class TorchBackend(Backend):
    """PyTorch."""

    def to_array(self, tensor: Any) -> Array:
        return tensor.detach().cpu().numpy()

    def array(self, value: Any) -> torch.Tensor:
        return torch.tensor(value)

    def differentiate(self, function: Any, *arrays: Array) -> tuple[Array, list[Array]]:
        tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
        value = function(*tensors)
        return value.detach().numpy(), [g.numpy() for g in torch.autograd.grad(value, tensors)]

    def random(self, seed: int) -> Any:
        return torch.Generator().manual_seed(seed)

    def seed_everything(self, seed: int) -> None:
        torch.manual_seed(seed)

    def call(self, model: Any, **inputs: Any) -> Any:
        with torch.inference_mode():
            return model(**inputs)

    def gradients(self, model: Any, head: Head, **inputs: Any) -> dict[str, Array]:
        model.zero_grad()
        model(**inputs).loss.backward()
        grads = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
        prefix = "model." if head == "none" else ""
        specs = param_specs(model.config, head)
        return {spec.name: grads[spec.name.removeprefix(prefix)] for spec in specs}
