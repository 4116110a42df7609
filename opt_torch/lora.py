"""Low-rank adapters on a model's linear layers: apply, merge, unmerge, save and load."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt_core.errors import ConfigError
from opt_core.params import param_specs
from opt_core.training import lora as files
from opt_core.training.lora import Adapter
from opt_torch.checkpoint import get_parameter, locate, set_parameter
from opt_torch.linear import Linear

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel


class LoraLinear(Linear):
    """A linear layer and its adapter, which work in float32 whatever the layer's type is.

    Args:
        base: The layer; its parameters are taken over, not copied.
        adapter: Rank and scale.
    """

    def __init__(self, base: Linear, adapter: Adapter):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
            self.lora_A = Linear(base.in_features, adapter.rank, bias=False)
            self.lora_B = Linear(adapter.rank, base.out_features, bias=False)
        self.weight, self.bias = base.weight, base.bias
        self.adapter = adapter
        self.unmerged: Tensor | None = None
        self.train(base.training)

    @property
    def adapts(self) -> bool:
        """Whether the adapter works beside the weight, which does not hold it."""
        return self.unmerged is None

    def forward(self, input: Tensor) -> Tensor:
        """Computes the layer's output and the adapter's."""
        out = super().forward(input)
        if not self.adapts:
            return out
        low = self.lora_A(input.to(self.lora_A.weight.dtype))
        return out + (self.lora_B(low) * self.adapter.scale).to(out.dtype)


def apply(
    model: "OPTPreTrainedModel",
    rank: int,
    alpha: float = 16.0,
    targets: tuple[str, ...] = files.TARGETS,
    seed: int = 0,
) -> Adapter:
    """Puts adapters on a model: it computes what it did until they are trained.

    Args:
        model: The model, changed in place.
        rank: Rank of the adapters.
        alpha: Their output is scaled by `alpha / rank`.
        targets: Names of the layers that get one.
        seed: Seed of A; B is zero.

    Raises:
        ConfigError: A value that cannot be, or the model has adapters already.
    """
    adapter = Adapter(rank, alpha, tuple(targets))
    if adapters(model):
        raise ConfigError("the model has adapters already; merge them first")
    for spec in files.adapted_specs(model.config, adapter.targets):
        layer, _ = locate(model, spec)
        if type(layer) is not Linear or not layer.weight.is_floating_point():
            raise ConfigError(f"{spec.name}: an adapter needs a plain linear layer")
        name = next(name for name, module in model.named_modules() if module is layer)
        model.set_submodule(name, LoraLinear(layer, adapter))
    for spec in files.adapter_specs(model.config, adapter.rank, adapter.targets):
        value = torch.from_numpy(files.initial_adapter(spec, seed))
        set_parameter(model, spec, value.to(model.device))
    return adapter


def merge(model: "OPTPreTrainedModel") -> None:
    """Adds the adapters to the weights: the model is as fast as before, and can be saved."""
    for layer in adapters(model):
        if layer.adapts:
            plain = layer.weight.detach()
            with torch.no_grad():
                product = layer.lora_B.weight @ layer.lora_A.weight * layer.adapter.scale
                layer.weight.data = (plain.to(product.dtype) + product).to(plain.dtype)
            layer.unmerged = plain


def unmerge(model: "OPTPreTrainedModel") -> None:
    """Gives the weights back as they were before `merge`, bit for bit."""
    for layer in adapters(model):
        if layer.unmerged is not None:
            layer.weight.data = layer.unmerged
            layer.unmerged = None


def save_adapter(model: "OPTPreTrainedModel", folder: str | PathLike[str], base: str = "") -> None:
    """Writes adapter_config.json and adapter_model.safetensors, as PEFT reads them.

    Args:
        model: With adapters.
        folder: A new folder.
        base: Name or path of the model without them.

    Raises:
        ConfigError: The model has no adapters.
    """
    found = adapters(model)
    if not found:
        raise ConfigError("the model has no adapters to save")

    def fetch(spec: Any) -> Any:
        return get_parameter(model, spec).float().cpu().numpy()

    files.save_adapter(Path(folder), model.config, model.head, found[0].adapter, fetch, base)


def load_adapter(model: "OPTPreTrainedModel", folder: str | PathLike[str]) -> None:
    """Puts the adapters of a folder, PEFT's or ours, on a model that has none.

    Args:
        model: The model that they were trained on.
        folder: The folder.

    Raises:
        CheckpointError: The files are damaged or do not fit the model.
    """
    adapter, values = files.read_adapter(Path(folder), model.config, model.head)
    apply(model, adapter.rank, adapter.alpha, adapter.targets)
    specs = files.adapter_specs(model.config, adapter.rank, adapter.targets)
    for spec in [*specs, *param_specs(model.config, model.head)]:
        if spec.name in values:
            kept = get_parameter(model, spec)
            set_parameter(model, spec, torch.from_numpy(values[spec.name].copy()).to(kept))


def adapters(model: "OPTPreTrainedModel") -> list[LoraLinear]:
    """The layers of a model that have an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLinear)]
