"""Low-rank adapters on a model's linear layers: apply, merge, unmerge, save and load.

Keras' own `enable_lora` makes a whole kernel of the adapter in every call, in the type of the
computation, where a small step of a bfloat16 kernel is lost.
"""

from os import PathLike
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from opt_core.dialects import KERAS
from opt_core.training import lora as files
from opt_core.training.lora import Adapter
from opt_tf import _private
from opt_tf.checkpoint import get_parameter, set_parameter
from opt_tf.linear import Embedding, Linear

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel


class LoraLinear(Linear):
    """A linear layer and its adapter, which work in float32 whatever the layer's type is.

    Args:
        base: The layer; its parameters are taken over, not copied.
        adapter: Rank and scale.
    """

    def __init__(self, base: Linear, adapter: Adapter):
        into, out, rank = base.in_features, base.out_features, adapter.rank
        super().__init__(into, out, base.use_bias, name=base.name, dtype=base.dtype_policy)
        self.weight, self.bias = base.weight, base.bias
        self.lora_A = Linear(into, rank, False, name="lora_A", dtype="float32")
        self.lora_B = Linear(rank, out, False, name="lora_B", dtype="float32")
        self.lora_A.build()
        self.lora_B.build()
        self.adapter = adapter
        self.unmerged: Any = None
        self.built = True

    @property
    def adapts(self) -> bool:
        """Whether the adapter works beside the weight, which does not hold it."""
        return self.unmerged is None

    def call(self, input: tf.Tensor) -> tf.Tensor:
        """Computes the layer's output and the adapter's."""
        out: Any = super().call(input)
        if not self.adapts:
            return out
        low: Any = self.lora_B(self.lora_A(input))
        return out + tf.cast(low * self.adapter.scale, out.dtype)


def apply(
    model: "TFOPTPreTrainedModel",
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
    model.programs.clear()
    return files.apply(model, Adapter(rank, alpha, tuple(targets)), seed, _HANDS)


def merge(model: "TFOPTPreTrainedModel") -> None:
    """Adds the adapters to the weights: the model is as fast as before, and can be saved."""
    for layer in adapters(model):
        if layer.adapts:
            weight, low, high = _weights(layer)
            plain: Any = tf.identity(weight.value)
            product: Any = tf.matmul(high.value, low.value)
            wide = tf.cast(plain, product.dtype) + product * layer.adapter.scale
            weight.assign(tf.cast(wide, plain.dtype))
            layer.unmerged = plain
    model.programs.clear()


def unmerge(model: "TFOPTPreTrainedModel") -> None:
    """Gives the weights back as they were before `merge`, bit for bit."""
    for layer in adapters(model):
        if not layer.adapts:
            _weights(layer)[0].assign(layer.unmerged)
            layer.unmerged = None
    model.programs.clear()


def unload(model: "TFOPTPreTrainedModel") -> None:
    """Takes the adapters off: what was merged stays, other layers are what they were before.

    Args:
        model: With adapters or without.
    """
    files.unload(model, _HANDS)
    model.programs.clear()


def save_adapter(
    model: "TFOPTPreTrainedModel", folder: str | PathLike[str], base: str = ""
) -> None:
    """Writes adapter_config.json and adapter_model.safetensors, as PEFT reads them.

    Args:
        model: With adapters.
        folder: A new folder.
        base: Name or path of the model without them.

    Raises:
        ConfigError: The model has no adapters.
    """
    files.save_model_adapter(model, folder, base, _HANDS)


def load_adapter(model: "TFOPTPreTrainedModel", folder: str | PathLike[str]) -> None:
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
    files.load_adapter(model, folder, _HANDS)
    model.programs.clear()


def adapters(model: "TFOPTPreTrainedModel") -> list[LoraLinear]:
    """The layers of a model that have an adapter."""
    return [layer for layer in _private.sublayers(model) if isinstance(layer, LoraLinear)]


def _weights(layer: LoraLinear) -> tuple[Any, Any, Any]:
    return layer.weight, layer.lora_A.weight, layer.lora_B.weight


def _fit(model: "TFOPTPreTrainedModel") -> None:
    decoder = model.get_decoder()
    table = decoder.embed_tokens
    rows, columns, options = model.config.vocab_size, model.config.embed_dim, _options(table)
    if table.input_dim != rows:
        _renew(decoder, "embed_tokens", Embedding(rows, columns, table.padding_idx, **options))
    if model.head == "causal_lm" and not model.config.tie_word_embeddings:
        options = _options(table) | {"name": "lm_head"}
        _renew(
            model,
            "lm_head",
            Linear(model.config.embed_dim, model.config.vocab_size, False, **options),
        )


def _bare(layer: LoraLinear) -> Linear:
    plain = Linear(layer.in_features, layer.out_features, layer.use_bias, **_options(layer))
    plain.built = True
    return plain


def _renew(parent: Any, name: str, layer: Any) -> None:
    layer.build()
    _private.replace_layer(parent, name, layer)


def _options(layer: Any) -> dict[str, Any]:
    return {"name": layer.name, "dtype": layer.dtype_policy}


_HANDS = files.Hands(
    KERAS, Linear, LoraLinear, get_parameter, set_parameter, _fit, _bare,
    lambda *given: _private.replace_layer(*given),
)  # fmt: skip
