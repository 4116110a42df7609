"""Low-rank adapters on a model's linear layers: apply, merge, unmerge, save and load."""

from os import PathLike
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from opt_core.dialects import NNX
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec
from opt_core.training import lora as files
from opt_core.training.lora import Adapter
from opt_flax import sharding
from opt_flax.checkpoint import as_array, get_parameter, locate, set_parameter
from opt_flax.linear import Linear

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTPreTrainedModel


class LoraLinear(Linear):
    """A linear layer and its adapter, which work in float32 whatever the layer's type is.

    Args:
        base: The layer; its parameters are taken over, not copied.
        adapter: Rank and scale.
    """

    def __init__(self, base: Linear, adapter: Adapter):
        into, out = base.in_features, base.out_features
        super().__init__(into, out, base.bias is not None, base.mesh)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = Linear(into, adapter.rank, bias=False)
        self.lora_B = Linear(adapter.rank, out, bias=False)
        self.adapter = adapter
        self.unmerged = nnx.Variable(None)

    @property
    def adapts(self) -> bool:
        """Whether the adapter works beside the weight, which does not hold it."""
        return self.unmerged.get_value() is None

    def __call__(self, input: Array) -> Array:
        """Computes the layer's output and the adapter's."""
        out = super().__call__(input)
        if not self.adapts:
            return out
        low = self.lora_A(input.astype(self.lora_A.weight.dtype))
        return out + (self.lora_B(low) * self.adapter.scale).astype(out.dtype)


def apply(
    model: "FlaxOPTPreTrainedModel",
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
    _check_unstacked(model)
    return files.apply(model, Adapter(rank, alpha, tuple(targets)), seed, _HANDS)


def merge(model: "FlaxOPTPreTrainedModel") -> None:
    """Adds the adapters to the weights: the model is as fast as before, and can be saved."""
    for layer in adapters(model):
        if layer.adapts:
            plain = layer.weight[...]
            product = layer.lora_B.weight[...] @ layer.lora_A.weight[...] * layer.adapter.scale
            layer.weight.set_value((plain.astype(product.dtype) + product).astype(plain.dtype))
            layer.unmerged.set_value(plain)


def unmerge(model: "FlaxOPTPreTrainedModel") -> None:
    """Gives the weights back as they were before `merge`, bit for bit."""
    for layer in adapters(model):
        if not layer.adapts:
            layer.weight.set_value(layer.unmerged.get_value())
            layer.unmerged.set_value(None)


def unload(model: "FlaxOPTPreTrainedModel") -> None:
    """Takes the adapters off: what was merged stays, other layers are what they were before.

    Args:
        model: With adapters or without.
    """
    files.unload(model, _HANDS)


def save_adapter(
    model: "FlaxOPTPreTrainedModel", folder: str | PathLike[str], base: str = ""
) -> None:
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


def load_adapter(model: "FlaxOPTPreTrainedModel", folder: str | PathLike[str]) -> None:
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
    _check_unstacked(model)
    files.load_adapter(model, folder, _HANDS)


def adapters(model: "FlaxOPTPreTrainedModel") -> list[LoraLinear]:
    """The layers of a model that have an adapter."""
    return [node for _, node in nnx.iter_graph(model) if isinstance(node, LoraLinear)]


def _check_unstacked(model: "FlaxOPTPreTrainedModel") -> None:
    if model.get_decoder().scan_layers:
        raise ConfigError("scan_layers: stacked layers take no adapters; load the model without")


def _fetch(model: "FlaxOPTPreTrainedModel", spec: ParamSpec) -> NDArray[Any]:
    return as_array(get_parameter(model, spec))


def _put(model: "FlaxOPTPreTrainedModel", spec: ParamSpec, values: NDArray[Any]) -> None:
    """Gives a parameter its values, in the canonical layout; adapters are on all of a mesh."""
    if "rank" in spec.axes:
        own = jnp.asarray(values, jnp.float32)
        locate(model, spec).set_value(sharding.place(own, model.mesh))
    else:
        set_parameter(model, spec, values)


def _fit(model: "FlaxOPTPreTrainedModel") -> None:
    table = model.get_decoder().embed_tokens
    table.num_embeddings = model.config.vocab_size
    if model.head == "causal_lm" and not model.config.tie_word_embeddings:
        head = Linear(model.config.embed_dim, model.config.vocab_size, bias=False, mesh=model.mesh)
        head.weight.set_value(table.embedding[...])  # of the type that it is to have
        setattr(model, "lm_head", nnx.data(head))  # noqa: B010


def _bare(layer: LoraLinear) -> Linear:
    return Linear(layer.in_features, layer.out_features, layer.bias is not None, layer.mesh)


_HANDS = files.Hands(NNX, Linear, LoraLinear, _fetch, _put, _fit, _bare, setattr)
