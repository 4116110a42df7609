"""The truth about parameters: which tensors a model has, their shapes, kinds and logical axes.

Loading, saving, conversion, counting, initialisation, weight decay, sharding and error reports are
all derived from this list, so that a tensor cannot be known to one of them and forgotten by
another. Names are those of `transformers`' `OPTForCausalLM` and its sibling heads.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from opt_core.config import OPTConfig

POSITION_OFFSET = 2
"""Rows in front of position 0 of the position table: fairseq's padding_idx + 1."""

Head = Literal["none", "causal_lm", "sequence_classification", "question_answering"]
Kind = Literal["linear", "embedding", "norm"]

HEAD_PARAMETERS: dict[Head, tuple[str, ...]] = {
    "none": (),
    "causal_lm": ("lm_head.weight",),
    "sequence_classification": ("score.weight",),
    "question_answering": ("qa_outputs.weight", "qa_outputs.bias"),
}
"""Tensors of each head: the only ones a checkpoint of another head may lack, or have to spare."""


@dataclass(frozen=True)
class ParamSpec:
    """One parameter tensor.

    Attributes:
        name: Canonical name, such as "model.decoder.layers.0.fc1.weight".
        shape: Shape in the canonical (torch) layout: a linear weight is [out, in].
        kind: Kind of the layer that owns it; with the last part of the name it decides how a
            framework spells it (`opt_core.dialects`) and whether weight decay applies.
        axes: One logical axis per dimension, for sharding: "vocab", "position", "hidden", "embed",
            "heads", "ffn" or "labels".
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    axes: tuple[str, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to every weight except biases and norms."""
        return self.kind != "norm" and self.name.endswith(".weight")


def param_specs(config: OPTConfig, head: Head = "causal_lm") -> list[ParamSpec]:
    """Every parameter of a model, in the order of its modules.

    Args:
        config: The model's configuration.
        head: Which head sits on the decoder. A tied language-model head has no parameter of its
            own.
    """
    return [*_decoder(config), *_head(config, head)]


def count_parameters(config: OPTConfig, head: Head = "causal_lm") -> int:
    """Number of distinct parameters of a model."""
    return sum(spec.size for spec in param_specs(config, head))


def _linear(
    name: str, out: tuple[int, str], into: tuple[int, str], bias: bool
) -> Iterator[ParamSpec]:
    yield ParamSpec(f"{name}.weight", (out[0], into[0]), "linear", (out[1], into[1]))
    if bias:
        yield ParamSpec(f"{name}.bias", (out[0],), "linear", (out[1],))


def _norm(name: str, config: OPTConfig) -> Iterator[ParamSpec]:
    if config.layer_norm_elementwise_affine:
        for leaf in ("weight", "bias"):
            yield ParamSpec(f"{name}.{leaf}", (config.hidden_size,), "norm", ("hidden",))


def _decoder(config: OPTConfig) -> Iterator[ParamSpec]:
    top = "model.decoder"
    hidden, embed = (config.hidden_size, "hidden"), (config.embed_dim, "embed")
    positions = config.max_position_embeddings + POSITION_OFFSET
    yield ParamSpec(
        f"{top}.embed_tokens.weight", (config.vocab_size, embed[0]), "embedding", ("vocab", "embed")
    )
    yield ParamSpec(
        f"{top}.embed_positions.weight", (positions, hidden[0]), "embedding", ("position", "hidden")
    )
    if config.has_projections:
        yield from _linear(f"{top}.project_out", embed, hidden, bias=False)
        yield from _linear(f"{top}.project_in", hidden, embed, bias=False)
    if config.has_final_layer_norm:
        yield from _norm(f"{top}.final_layer_norm", config)
    for i in range(config.num_hidden_layers):
        yield from _layer(f"{top}.layers.{i}", config)


def _layer(name: str, config: OPTConfig) -> Iterator[ParamSpec]:
    hidden, ffn = (config.hidden_size, "hidden"), (config.ffn_dim, "ffn")
    heads = (config.hidden_size, "heads")
    for projection in ("k_proj", "v_proj", "q_proj"):
        yield from _linear(f"{name}.self_attn.{projection}", heads, hidden, config.enable_bias)
    yield from _linear(f"{name}.self_attn.out_proj", hidden, heads, config.enable_bias)
    yield from _norm(f"{name}.self_attn_layer_norm", config)
    yield from _linear(f"{name}.fc1", ffn, hidden, config.enable_bias)
    yield from _linear(f"{name}.fc2", hidden, ffn, config.enable_bias)
    yield from _norm(f"{name}.final_layer_norm", config)


def _head(config: OPTConfig, head: Head) -> Iterator[ParamSpec]:
    embed = (config.embed_dim, "embed")
    if head == "causal_lm" and not config.tie_word_embeddings:
        yield from _linear("lm_head", (config.vocab_size, "vocab"), embed, bias=False)
    elif head == "sequence_classification":
        yield from _linear("score", (config.num_labels, "labels"), embed, bias=False)
    elif head == "question_answering":
        yield from _linear("qa_outputs", (2, "labels"), embed, bias=True)
