"""How each framework spells a parameter: a path rule and a leaf rule, not a table per backend.

Module names agree everywhere (they are Hugging Face's), so only the last part differs (`weight`,
`kernel`, `embedding`, `scale`, `gamma`, `beta`), and what the list of layers is called.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from opt_core.params import Head, Kind, ParamSpec


@dataclass(frozen=True)
class Dialect:
    """One framework's spelling of parameter names.

    Attributes:
        leaves: (kind, canonical leaf) -> the framework's leaf.
        layers: The attribute that holds the decoder layers.
    """

    leaves: dict[tuple[Kind, str], str]
    layers: str = "layers"

    def path(self, spec: ParamSpec, head: Head = "causal_lm") -> tuple[str, ...]:
        """The attributes to follow from a model to a parameter, indices of layers as digits.

        Args:
            spec: The parameter.
            head: The model's head; a bare model is what the others keep as `model`.
        """
        first, *modules, leaf = spec.name.split(".")
        modules = modules if head == "none" else [first, *modules]
        return (
            *(self.layers if m == "layers" else m for m in modules),
            self.leaves[spec.kind, leaf],
        )

    def owner(self, model: Any, spec: ParamSpec) -> tuple[Any, str]:
        """The layer that owns a parameter, and the parameter's name there.

        Args:
            model: A model of the framework.
            spec: The parameter.
        """
        *modules, leaf = self.path(spec, model.head)
        return follow(model, modules), leaf

    def parent(self, model: Any, spec: ParamSpec) -> tuple[Any, str]:
        """The module that holds the layer that owns a parameter, and the layer's name there.

        Args:
            model: A model of the framework.
            spec: The parameter.
        """
        *modules, layer, _ = self.path(spec, model.head)
        return follow(model, modules), layer


def follow(node: Any, path: Iterable[str | int]) -> Any:
    """The object at a path of attributes and indices, these as numbers or digits."""
    for part in path:
        node = node[int(part)] if str(part).isdigit() else getattr(node, str(part))
    return node


TORCH = Dialect(
    {
        ("linear", "weight"): "weight",
        ("linear", "bias"): "bias",
        ("embedding", "weight"): "weight",
        ("norm", "weight"): "weight",
        ("norm", "bias"): "bias",
    },
)
KERAS = Dialect(
    {
        ("linear", "weight"): "weight",
        ("linear", "bias"): "bias",
        ("embedding", "weight"): "embeddings",
        ("norm", "weight"): "gamma",
        ("norm", "bias"): "beta",
    },
    layers="blocks",  # `keras.Model.layers` cannot be assigned
)
NNX = Dialect(
    {
        ("linear", "weight"): "weight",  # not `kernel`, which in Flax means [in, out]
        ("linear", "bias"): "bias",
        ("embedding", "weight"): "embedding",
        ("norm", "weight"): "scale",
        ("norm", "bias"): "bias",
    },
)
LINEN = Dialect({**NNX.leaves, ("linear", "weight"): "kernel"})
"""Flax' former models, those of `transformers`: a kernel is [in, out]."""
