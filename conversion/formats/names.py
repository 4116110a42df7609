"""Names of parameters in each file format, and which of their tensors are stored transposed.

`opt_core.dialects` has the names that models use; file formats differ from them in details only.
"""

import re
from collections.abc import Iterable

from opt_core.checkpoints.load import canonical_name
from opt_core.dialects import LINEN, Dialect
from opt_core.params import ParamSpec

FLAX = LINEN
KERAS2 = Dialect(
    {
        ("linear", "weight"): "kernel:0",
        ("linear", "bias"): "bias:0",
        ("embedding", "weight"): "embeddings:0",
        ("norm", "weight"): "gamma:0",
        ("norm", "bias"): "beta:0",
    },
)
TF_MODEL = "tfopt_for_causal_lm"
"""The model's name in Keras 2, the first part of every variable's."""

_LEAVES = {
    **dict.fromkeys(("kernel", "embedding", "embeddings", "scale", "gamma", "weight"), "weight"),
    **dict.fromkeys(("bias", "beta"), "bias"),
}
_TF_MODEL = re.compile(r"tf_?opt\w*")


def flax_path(spec: ParamSpec) -> tuple[str, ...]:
    """The keys from the root of the nested dict to a parameter."""
    return FLAX.path(spec)


def keras2_name(spec: ParamSpec) -> str:
    """The name of a TensorFlow variable, such as "model/decoder/layers.0/fc1/kernel:0"."""
    *modules, leaf = KERAS2.path(spec)
    if modules[-1] == "embed_tokens":
        leaf = "weight:0"  # not a Keras layer of its own time, but TFSharedEmbeddings
    return re.sub(r"/layers/(\d+)/", r"/layers.\1/", "/".join([*modules, leaf]))


def from_keras2(name: str) -> str | None:
    """The canonical name of a TensorFlow variable; None for what is no weight."""
    first, _, rest = name.partition("/")
    return from_path((rest if _TF_MODEL.fullmatch(first) and rest else name).split("/"))


def from_path(path: Iterable[str]) -> str | None:
    """The canonical name of a path of modules that ends in a framework's name of the tensor."""
    *modules, leaf = path
    if modules[:1] == ["params"]:
        modules = modules[1:]
    leaf = leaf.removesuffix(":0")
    return canonical_name(".".join([*modules, _LEAVES.get(leaf, leaf)]))


def is_kernel(name: str) -> bool:
    """Whether a framework's name of a tensor says that it is kept as [in, out]."""
    return name.removesuffix(":0").endswith("kernel")
