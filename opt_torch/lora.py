"""Low-rank adapters on a model's linear layers: apply, merge, unmerge, save and load."""

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opt_core.dialects import TORCH
from opt_core.params import ParamSpec
from opt_core.training import lora as files
from opt_core.training.lora import Adapter
from opt_torch import distribution, sharding
from opt_torch.checkpoint import as_array, as_tensor, get_parameter, locate, set_parameter, tie
from opt_torch.linear import multiply

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel


class LoraLinear(nn.Linear):
    """A linear layer and its adapter, which work in float32 whatever the layer's type is.

    Args:
        base: The layer; its parameters are taken over, not copied.
        adapter: Rank and scale.
    """

    def __init__(self, base: nn.Linear, adapter: Adapter):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self._take(adapter, base.training)

    def _take(self, adapter: Adapter, trains: bool) -> None:
        with torch.device("meta"):
            low, wide = adapter.rank, torch.float32
            self.lora_A = nn.Linear(self.in_features, low, bias=False, dtype=wide)
            self.lora_B = nn.Linear(low, self.out_features, bias=False, dtype=wide)
        self.adapter = adapter
        self.unmerged: Tensor | None = None
        self.train(trains)

    @property
    def adapts(self) -> bool:
        """Whether the adapter works beside the weight, which does not hold it."""
        return self.unmerged is None

    def forward(self, input: Tensor) -> Tensor:
        """Computes the layer's output and the adapter's."""
        out = multiply(input, self.weight, self.bias)
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
    distribution.settle(model)
    return files.apply(model, Adapter(rank, alpha, tuple(targets)), seed, _HANDS)


def merge(model: "OPTPreTrainedModel") -> None:
    """Adds the adapters to the weights: the model is as fast as before, and can be saved."""
    for layer in adapters(model):
        if layer.adapts and model.mesh is not None:
            layer.unmerged = distribution.add_product(
                model, layer, layer.lora_B.weight, layer.lora_A.weight, layer.adapter.scale
            )
        elif layer.adapts:
            plain = layer.weight.detach()
            with torch.no_grad():
                product = layer.lora_B.weight @ layer.lora_A.weight * layer.adapter.scale
                layer.weight.data = (plain.to(product.dtype) + product).to(plain.dtype)
            layer.unmerged = plain


def unmerge(model: "OPTPreTrainedModel") -> None:
    """Gives the weights back as they were before `merge`, bit for bit."""
    for layer in adapters(model):
        if layer.unmerged is not None:
            if model.mesh is None:
                layer.weight.data = layer.unmerged
            else:
                distribution.settle(model)
                distribution.local(layer.weight.data).copy_(layer.unmerged)
            layer.unmerged = None


def unload(model: "OPTPreTrainedModel") -> None:
    """Takes the adapters off: what was merged stays, other layers are what they were before.

    Args:
        model: With adapters or without.
    """
    distribution.settle(model)
    files.unload(model, _HANDS)


def save_adapter(model: "OPTPreTrainedModel", folder: str | PathLike[str], base: str = "") -> None:
    """Writes adapter_config.json and adapter_model.safetensors, as PEFT reads them.

    Args:
        model: With adapters.
        folder: A new folder.
        base: Name or path of the model without them.

    Raises:
        ConfigError: The model has no adapters.
    """
    team = sharding.team_of(model.mesh)
    if team.count == 1:
        files.save_model_adapter(model, folder, base, _HANDS)
        return
    held = {spec.name: _fetch(model, spec) for spec in files.saved_specs(model, _HANDS)}
    hands = _HANDS._replace(fetch=lambda model, spec: held[spec.name])
    team.together(
        lambda: files.save_model_adapter(model, folder, base, hands) if team.is_first else None
    )


def load_adapter(model: "OPTPreTrainedModel", folder: str | PathLike[str]) -> None:
    """Puts the adapters of a folder, PEFT's or ours, on a model that has none.

    Linear layers get theirs beside their weights, which `merge` adds and `unmerge` takes back. What
    can only be had in the weights themselves (DoRA, embeddings, biases, modules trained as a whole)
    replaces them; the vocabulary becomes what the adapter was trained with.

    Args:
        model: The model that they were trained on.
        folder: The folder, or a hub id.

    Raises:
        CheckpointError: The files are damaged or do not fit the model.
        ConfigError: The model has adapters already.
    """
    distribution.settle(model)
    files.load_adapter(model, folder, _HANDS)


def adapters(model: "OPTPreTrainedModel") -> list[LoraLinear]:
    """The layers of a model that have an adapter."""
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def _fetch(model: "OPTPreTrainedModel", spec: ParamSpec) -> NDArray[Any]:
    return as_array(get_parameter(model, spec))


def _put(model: "OPTPreTrainedModel", spec: ParamSpec, values: NDArray[Any]) -> None:
    """Gives a parameter its values, in its own type."""
    dtype = locate(model, spec).dtype
    set_parameter(model, spec, as_tensor(values.copy()).to(model.device, dtype))
    tie(model)


def _fit(model: "OPTPreTrainedModel") -> None:
    table: Any = model.get_decoder().embed_tokens
    table.num_embeddings = model.config.vocab_size
    if model.head == "causal_lm":
        head: Any = model.get_submodule("lm_head")
        head.out_features = model.config.vocab_size


def _adapted(base: nn.Linear, adapter: Adapter) -> LoraLinear:
    """A layer with an adapter; on a mesh the very same one, which PyTorch's hooks are on."""
    if not sharding.is_spread(base.weight):
        return LoraLinear(base, adapter)
    layer: Any = base
    layer.__class__ = LoraLinear
    layer._take(adapter, base.training)
    return layer


def _bare(layer: LoraLinear) -> nn.Linear:
    if sharding.is_spread(layer.weight):
        plain: Any = layer
        del plain.lora_A, plain.lora_B, plain.adapter, plain.unmerged
        plain.__class__ = nn.Linear
        return plain
    with torch.device("meta"):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    return plain.train(layer.training)


_HANDS = files.Hands(TORCH, nn.Linear, _adapted, _fetch, _put, _fit, _bare, setattr)
