"""Decode steps with little Python in the way.

On the CPU a small model's step is so short that calling its modules takes a quarter of it. Here the
same operations run in the same order on the same weights, to the same bits, without the modules
around them. A model that has something of its own about it (hooks, adapters, other modules) is left
to its modules.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_core.params import POSITION_OFFSET
from opt_torch.attention import OPTAttention, make_bias
from opt_torch.cache import KVCache, position_rows
from opt_torch.decoder import ACTIVATIONS, OPTDecoder, OPTDecoderLayer, PositionEmbedding
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
RowsStep = Callable[[Tensor, Sequence[Tensor], Sequence[Tensor], list[int], list[int]], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of new queries, keys and values, (B, H, K) each, what attention mixes: B * H * K numbers."""

_KNOWN = {
    *(OPTDecoder, OPTDecoderLayer, OPTAttention, nn.ModuleList, nn.LayerNorm, nn.Embedding),
    PositionEmbedding,
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
    lean, positions = _LeanModel(model), model.get_decoder().embed_positions.weight

    def step(ids_B: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
        past, mask = cache.length, cache.mask
        if mask is None:
            bias, rows = None, positions[past + POSITION_OFFSET]
        else:
            mask = mask[:, : past + 1]
            bias = make_bias(mask, 1, past, past + 1, positions.dtype, positions.device)
            rows = F.embedding(position_rows(mask, past, 1, positions.device)[:, 0], positions)
        attends = (
            partial(_attend_together, keys, values, past, bias)
            for keys, values in zip(cache.keys, cache.values, strict=True)
        )
        return lean(ids_B, rows, attends), cache.advance(1, None)

    return step


def make_rows_step(model: "OPTForCausalLM") -> RowsStep | None:
    """A function that decodes rows of different lengths, while the model stays as it is.

    Each row looks at its own tokens alone: with a mask over the longest one's slots, all rows would
    read from memory as many keys and values as that one.

    Returns:
        A function of ids (X,), the keys and values of a cache of R rows, the X rows in it that the
        ids are for, and the slot of each new token, which is its position; it writes the cache and
        gives the logits (X, V). None if the model is to be left to its modules.
    """
    if not is_plain(model):
        return None
    lean, positions = _LeanModel(model), model.get_decoder().embed_positions.weight

    def step(
        ids_X: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor],
        rows: list[int], places: list[int],
    ) -> Tensor:  # fmt: skip
        where = torch.tensor([rows, places])
        attends = (
            partial(_attend_each, *buffers, rows, places, where)
            for buffers in zip(keys, values, strict=True)
        )
        return lean(ids_X, F.embedding(where[1] + POSITION_OFFSET, positions), attends)

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


class _LeanModel:
    """A model for one token per row."""

    def __init__(self, model: "OPTForCausalLM"):
        decoder = model.get_decoder()
        self.embed_tokens = decoder.embed_tokens
        self.project_in, self.project_out = decoder.project_in, decoder.project_out
        self.layers = [
            _DecodeLayer(layer) for layer in decoder.layers if isinstance(layer, OPTDecoderLayer)
        ]
        self.norm = decoder.final_layer_norm and _norm(decoder.final_layer_norm)
        self.head = bind(model.lm_head)

    def __call__(self, ids_B: Tensor, positions: Tensor, attends: Iterable[Attend]) -> Tensor:
        """The logits (B, V) after ids; `attends` has the attention of each layer."""
        hidden = self.embed_tokens(ids_B)
        if self.project_in is not None:
            hidden = apply_linear(self.project_in, hidden)
        hidden = hidden + positions
        for layer, attend in zip(self.layers, attends, strict=True):
            hidden = layer(hidden, attend)
        if self.norm is not None:
            hidden = self.norm(hidden)
        if self.project_out is not None:
            hidden = apply_linear(self.project_out, hidden)
        return self.head(hidden)


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

    def __call__(self, hidden: Tensor, attend: Attend) -> Tensor:
        """The new hidden states (B, D)."""
        residual, (B, _) = hidden, hidden.shape
        first, second = self.norms
        if self.norm_first:
            hidden = first(hidden)
        heads = (B, *self.heads)
        query, key, value = self.qkv(hidden)
        mixed = attend(query.view(heads), key.view(heads), value.view(heads))
        hidden = residual + self.out(mixed.view(B, -1))
        if not self.norm_first:
            hidden = first(hidden)
        residual = hidden
        if self.norm_first:
            hidden = second(hidden)
        hidden = residual + self.fc2(self.activation(self.fc1(hidden)))
        return hidden if self.norm_first else second(hidden)


def _attend_together(
    keys: Tensor, values: Tensor, past: int, bias: Tensor | None,
    query: Tensor, key: Tensor, value: Tensor,
) -> Tensor:  # fmt: skip
    """Rows of one length, whose new token is in slot `past`."""
    keys.select(2, past).copy_(key)
    values.select(2, past).copy_(value)
    seen = keys.narrow(2, 0, past + 1), values.narrow(2, 0, past + 1)
    return F.scaled_dot_product_attention(query.unsqueeze(2), *seen, bias)


def _attend_each(
    keys: Tensor, values: Tensor, rows: list[int], places: list[int], where: Tensor,
    query: Tensor, key: Tensor, value: Tensor,
) -> Tensor:  # fmt: skip
    """Rows of lengths of their own; `where` has their numbers and places (2, X) as a tensor."""
    keys[where[0], :, where[1]] = key
    values[where[0], :, where[1]] = value
    mixed = [
        F.scaled_dot_product_attention(
            one[None, :, None],
            keys[row : row + 1].narrow(2, 0, place + 1),
            values[row : row + 1].narrow(2, 0, place + 1),
        )
        for one, row, place in zip(query, rows, places, strict=True)
    ]
    return torch.cat(mixed)


def _norm(norm: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    shape, weight, bias, epsilon = list(norm.normalized_shape), norm.weight, norm.bias, norm.eps
    return lambda hidden: torch.layer_norm(hidden, shape, weight, bias, epsilon)
