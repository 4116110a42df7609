"""The decoder: layers, norms, embeddings and projections, and what a model returns."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from opt_core.compatibility.parts import PositionTable, run_by_model
from opt_core.config import OPTConfig
from opt_core.decoder import DecoderLayerMixin, DecoderMixin
from opt_core.outputs import ModelOutput
from opt_core.params import POSITION_OFFSET
from opt_torch import _private, inputs
from opt_torch.attention import OPTAttention, make_bias
from opt_torch.cache import KVCache, position_rows
from opt_torch.linear import apply_linear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swish": F.silu,
}


class OPTOutput(ModelOutput[Tensor, KVCache]):
    """The output of a model: see `ModelOutput` for its fields."""

    _is_compiled = staticmethod(_private.is_compiling)


_private.register_output(OPTOutput)


class OPTDecoderLayer(DecoderLayerMixin, nn.Module):
    """One layer: attention and feed-forward, each with a norm and a residual connection."""

    def __init__(self, config: OPTConfig, implementation: str):
        super().__init__()
        D, bias = config.hidden_size, config.enable_bias
        self.norm_first = config.do_layer_norm_before
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = OPTAttention(config, implementation)
        self.self_attn_layer_norm = make_norm(config)
        self.fc1 = nn.Linear(D, config.ffn_dim, bias=bias)
        self.fc2 = nn.Linear(config.ffn_dim, D, bias=bias)
        self.final_layer_norm = make_norm(config)

    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        mask_BS: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        output_attentions: bool = False,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the new hidden states (B, T, D) and, if asked for, the attention weights.

        `attention_mask` is added to the scores (`make_bias`): programs that quantise or prune a
        layer at a time give it by this name.
        """

        def attend(hidden: Tensor) -> tuple[Any, ...]:
            hidden, weights = self.self_attn(
                hidden, attention_mask, mask_BS, cache, layer, output_attentions, head_mask
            )
            return F.dropout(hidden, self.dropout, self.training), weights

        def feed_forward(hidden: Tensor) -> tuple[Tensor]:
            hidden = apply_linear(self.fc2, self.activation(apply_linear(self.fc1, hidden)))
            return (F.dropout(hidden, self.dropout, self.training),)

        hidden, weights = self._residual(hidden, self.self_attn_layer_norm, attend)
        (hidden,) = self._residual(hidden, self.final_layer_norm, feed_forward)
        return hidden, weights


class PositionEmbedding(PositionTable, nn.Embedding):
    """The table of positions."""

    _check_ranges = staticmethod(inputs.check_ranges)

    @staticmethod
    def _rows_of(mask_BS: Tensor, past: int) -> Tensor:
        return position_rows(mask_BS.bool(), past, mask_BS.shape[1] - past, mask_BS.device)

    def forward(
        self,
        attention_mask: Tensor,
        past_key_values_length: int | None = 0,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """Looks positions up.

        Args:
            attention_mask: (B, S) 1 for tokens, 0 for padding; positions follow from it.
            past_key_values_length: Tokens at its beginning that were looked up before. None: what
                comes first are rows of the table themselves, as the decoder knows them.
            position_ids: (B, T) positions, which the mask then does not say.

        Raises:
            InputError: The mask is none.
        """
        return super().forward(self._rows(attention_mask, past_key_values_length, position_ids))


class OPTDecoder(DecoderMixin, nn.Module):
    """Embeddings, the layers, the last norm and the projections around them."""

    _project = staticmethod(apply_linear)

    def __init__(self, config: OPTConfig, implementation: str):
        super().__init__()
        D, P = config.hidden_size, config.embed_dim
        self.config = config
        self.implementation = implementation
        self.gradient_checkpointing = config.gradient_checkpointing
        self.embed_tokens = _make_embedding(nn.Embedding, config.vocab_size, P, config.pad_token_id)
        self.embed_positions = _make_embedding(
            PositionEmbedding, config.max_position_embeddings + POSITION_OFFSET, D
        )
        self.project_out = nn.Linear(D, P, bias=False) if config.has_projections else None
        self.project_in = nn.Linear(P, D, bias=False) if config.has_projections else None
        self.final_layer_norm = make_norm(config) if config.has_final_layer_norm else None
        self.layers = nn.ModuleList(
            OPTDecoderLayer(config, implementation) for _ in range(config.num_hidden_layers)
        )

    @run_by_model
    def forward(
        self,
        embeds: Tensor,
        position_ids: Tensor | None,
        mask_BS: Tensor | None,
        cache: KVCache | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        head_mask: Sequence[Tensor] | None = None,
    ) -> OPTOutput:
        """Runs the decoder.

        Args:
            embeds: Token embeddings (B, T, P).
            position_ids: Positions (B, T), -1 for padding; None: they follow from the mask.
            mask_BS: bool (B, past + T), False at padding; None: no padding.
            cache: What came before; None: nothing.
            output_hidden_states: Return the states between the layers too.
            output_attentions: Return the attention weights too.
            head_mask: (H,) numbers for each layer, which its heads' weights are multiplied by.
        """
        count, past = embeds.shape[1], cache.length if cache else 0
        if position_ids is None:
            rows = position_rows(mask_BS, past, count, embeds.device)
        else:
            rows = position_ids + POSITION_OFFSET
        hidden = self._enter(embeds, rows)
        bias = None
        if self.implementation != "flash_attention_2" or output_attentions:
            bias = make_bias(mask_BS, count, past, past + count, hidden.dtype, hidden.device)
        states, attentions = [], []
        for i, layer in enumerate(self.layers):
            states.append(hidden)
            heads = None if head_mask is None else head_mask[i]
            if self.training and self.config.layerdrop and torch.rand(()) < self.config.layerdrop:
                continue
            given = {
                "attention_mask": bias, "mask_BS": mask_BS, "cache": cache, "layer": i,
                "output_attentions": output_attentions, "head_mask": heads,
            }  # fmt: skip
            if self.gradient_checkpointing and self.training:
                hidden, weights = recompute(layer, hidden, use_reentrant=False, **given)
            else:
                hidden, weights = layer(hidden, **given)
            attentions.append(weights)
        hidden = self._leave(hidden)
        return OPTOutput(
            last_hidden_state=hidden,
            past_key_values=cache.advance(count, mask_BS) if cache else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def _make_embedding(
    kind: type[nn.Embedding], rows: int, width: int, padding_idx: int | None = None
) -> nn.Embedding:
    """A table without values: to draw some on the meta device PyTorch imports its compiler."""
    table = torch.empty(rows, width)
    return kind.from_pretrained(table, freeze=False, padding_idx=padding_idx)


def make_norm(config: OPTConfig) -> nn.LayerNorm:
    """A layer norm as OPT has them: epsilon 1e-5, with or without gamma and beta."""
    return nn.LayerNorm(config.hidden_size, 1e-5, config.layer_norm_elementwise_affine)
