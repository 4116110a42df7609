"""One decode step with little Python in the way.

On the CPU a small model's step is so short that calling its modules takes a quarter of it. Here the
same operations run in the same order on the same weights, to the same bits, without the modules
around them. A model that has something of its own about it (hooks, adapters, other modules) is left
to its modules.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_core.params import POSITION_OFFSET
from opt_torch.attention import OPTAttention, make_bias
from opt_torch.cache import KVCache, position_rows
from opt_torch.decoder import ACTIVATIONS, OPTDecoder, OPTDecoderLayer
from opt_torch.linear import apply_linear, has_custom_call, is_eager
from opt_torch.quantization import (
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedWeight,
    bind,
    make_fused_linear,
)

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM

Step = Callable[[Tensor, KVCache], tuple[Tensor, KVCache]]

_KNOWN = {
    *(OPTDecoder, OPTDecoderLayer, OPTAttention, nn.ModuleList, nn.LayerNorm, nn.Embedding),
    *(nn.Linear, QuantizedLinear, QuantizedEmbedding, QuantizedWeight),
}


def make_step(model: "OPTForCausalLM") -> Step | None:
    """A function that does what `generation.decode_step` does, while the model stays as it is.

    Returns:
        A function of ids (B,) and the cache; it gives the logits (B, V) after them, and the cache
        that holds them. None if the model is to be left to its modules.
    """
    if not is_plain(model):
        return None
    decoder = model.get_decoder()
    project_in, project_out = decoder.project_in, decoder.project_out
    layers = [_DecodeLayer(layer) for layer in decoder.layers if isinstance(layer, OPTDecoderLayer)]
    norm = decoder.final_layer_norm and _norm(decoder.final_layer_norm)
    head, positions = bind(model.lm_head), decoder.embed_positions.weight

    def step(ids_B: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        past, mask = cache.length, cache.mask
        hidden = decoder.embed_tokens(ids_B)
        if project_in is not None:
            hidden = apply_linear(project_in, hidden)
        if mask is None:
            bias, rows = None, positions[past + POSITION_OFFSET]
        else:
            mask = mask[:, : past + 1]
            bias = make_bias(mask, 1, past, past + 1, hidden.dtype, hidden.device)
            rows = F.embedding(position_rows(mask, past, 1, hidden.device)[:, 0], positions)
        hidden = hidden + rows
        for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
            hidden = layer(hidden, keys, values, past, bias)
        if norm is not None:
            hidden = norm(hidden)
        if project_out is not None:
            hidden = apply_linear(project_out, hidden)
        return head(hidden), cache.advance(1, None)

    return step


def is_plain(model: "OPTForCausalLM") -> bool:
    """Whether a model computes what its configuration says, on the CPU, and nothing beside it."""
    decoder = model.get_decoder()
    kinds = _KNOWN | {type(model), type(model.model)}
    return (
        model.device.type == "cpu"
        and decoder.implementation == "sdpa"
        and is_eager(decoder.embed_positions.weight)
        and all(_is_plain(module, kinds) for module in model.modules())
    )


def _is_plain(module: nn.Module, kinds: set[type[nn.Module]]) -> bool:
    return type(module) in kinds and not has_custom_call(module) and not module.training


class _DecodeLayer:
    """One decoder layer for one token per row."""

    def __init__(self, layer: OPTDecoderLayer):
        attention = layer.self_attn
        self.norm_first = layer.norm_first
        self.heads = attention.num_heads, attention.head_dim
        self.norms = _norm(layer.self_attn_layer_norm), _norm(layer.final_layer_norm)
        self.qkv = make_fused_linear((attention.q_proj, attention.k_proj, attention.v_proj))
        self.out = bind(attention.out_proj)
        self.fc1, self.fc2 = bind(layer.fc1), bind(layer.fc2)
        is_relu = layer.activation is ACTIVATIONS["relu"]
        self.activation = torch.relu_ if is_relu else layer.activation

    def __call__(
        self, hidden: Tensor, keys: Tensor, values: Tensor, past: int, bias: Tensor | None
    ) -> Tensor:
        """The new hidden states (B, D)."""
        residual, (B, _) = hidden, hidden.shape
        first, second = self.norms
        if self.norm_first:
            hidden = first(hidden)
        heads, end = (B, *self.heads), past + 1
        query, key, value = self.qkv(hidden)
        keys.select(2, past).copy_(key.view(heads))
        values.select(2, past).copy_(value.view(heads))
        mixed = F.scaled_dot_product_attention(
            query.view(heads).unsqueeze(2),
            keys.narrow(2, 0, end),
            values.narrow(2, 0, end),
            bias,
        )
        hidden = residual + self.out(mixed.view(B, -1))
        if not self.norm_first:
            hidden = first(hidden)
        residual = hidden
        if self.norm_first:
            hidden = second(hidden)
        hidden = residual + self.fc2(self.activation(self.fc1(hidden)))
        return hidden if self.norm_first else second(hidden)


def _norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias, epsilon = list(norm.normalized_shape), norm.weight, norm.bias, norm.eps
    return lambda hidden: torch.layer_norm(hidden, shape, weight, bias, epsilon)
