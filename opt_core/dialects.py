"""How each framework spells a parameter: a path rule and a leaf rule, not a table per backend.

Module names agree everywhere (they are Hugging Face's), so only the last part differs (`weight`,
`kernel`, `embedding`, `scale`, `gamma`, `beta`), whether a linear weight is transposed, and what
the list of layers is called.
"""

from dataclasses import dataclass

from opt_core.params import Kind, ParamSpec


@dataclass(frozen=True)
class Dialect:
    """One framework's spelling of parameter names.

    Attributes:
        name: "torch", "keras" or "nnx".
        leaves: (kind, canonical leaf) -> the framework's leaf.
        layers: The attribute that holds the decoder layers.
        transposes_linear: Whether a linear weight is kept as [in, out] instead of [out, in].
    """

    name: str
    leaves: dict[tuple[Kind, str], str]
    layers: str = "layers"
    transposes_linear: bool = False

    def path(self, spec: ParamSpec) -> tuple[str, ...]:
        """The attributes to follow from the model to the parameter, indices of layers as digits."""
        *modules, leaf = spec.name.split(".")
        return (
            *(self.layers if m == "layers" else m for m in modules),
            self.leaves[spec.kind, leaf],
        )

    def is_transposed(self, spec: ParamSpec) -> bool:
        """Whether the framework keeps this tensor with its two dimensions swapped."""
        return self.transposes_linear and spec.kind == "linear" and len(spec.shape) == 2

    def shape(self, spec: ParamSpec) -> tuple[int, ...]:
        """The tensor's shape as the framework keeps it."""
        return spec.shape[::-1] if self.is_transposed(spec) else spec.shape

    def axes(self, spec: ParamSpec) -> tuple[str, ...]:
        """The tensor's logical axes as the framework keeps it."""
        return spec.axes[::-1] if self.is_transposed(spec) else spec.axes


TORCH = Dialect(
    "torch",
    {
        ("linear", "weight"): "weight",
        ("linear", "bias"): "bias",
        ("embedding", "weight"): "weight",
        ("norm", "weight"): "weight",
        ("norm", "bias"): "bias",
    },
)
KERAS = Dialect(
    "keras",
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
    "nnx",
    {
        ("linear", "weight"): "weight",  # not `kernel`, which in Flax means [in, out]
        ("linear", "bias"): "bias",
        ("embedding", "weight"): "embedding",
        ("norm", "weight"): "scale",
        ("norm", "bias"): "bias",
    },
)
