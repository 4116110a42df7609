"""The decoder: layers, norms, embeddings and projections, and what a model returns."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey

from opt_core.compatibility.parts import PositionTable, run_by_model
from opt_core.config import OPTConfig
from opt_core.decoder import DecoderLayerMixin, DecoderMixin
from opt_core.outputs import ModelOutput
from opt_core.params import POSITION_OFFSET
from opt_flax import inputs
from opt_flax.attention import FlaxOPTAttention, make_bias
from opt_flax.cache import KVCache, position_rows
from opt_flax.linear import Embedding, Linear, apply_dropout
from opt_flax.sharding import constrain_rows

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


class FlaxOPTOutput(ModelOutput[Array, KVCache]):
    """The output of a model: see `ModelOutput` for its fields."""

    def replace(self, **changes: Any) -> "FlaxOPTOutput":
        """A copy with other fields, as Flax' dataclasses make one."""
        return FlaxOPTOutput(self, **changes)


jax.tree_util.register_pytree_with_keys(
    FlaxOPTOutput,
    lambda output: ([(DictKey(name), value) for name, value in output.items()], tuple(output)),
    lambda names, values: FlaxOPTOutput(zip(names, values, strict=True)),
)


class FlaxOPTDecoderLayer(DecoderLayerMixin, nnx.Module):
    """One layer: attention and feed-forward, each with a norm and a residual connection."""

    def __init__(self, config: OPTConfig, implementation: str, mesh: Mesh | None = None):
        D, bias = config.hidden_size, config.enable_bias
        self.norm_first = config.do_layer_norm_before
        self.dropout = config.dropout
        self.activation = config.activation_function
        self.self_attn = FlaxOPTAttention(config, implementation, mesh)
        self.self_attn_layer_norm = make_norm(config)
        self.fc1 = Linear(D, config.ffn_dim, bias, mesh)
        self.fc2 = Linear(config.ffn_dim, D, bias, mesh)
        self.final_layer_norm = make_norm(config)

    def __call__(
        self,
        hidden: Array,
        bias: Array | None,
        mask_BS: Array | None,
        cache: KVCache | None,
        layer: int,
        key: Array | None,
        output_attentions: bool,
        head_mask: Array | None = None,
    ) -> tuple[Array, Array | None, tuple[Array, Array] | None]:
        """Returns the new states (B, T, D), the attention weights if asked for, and the buffers."""
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)

        def attend(hidden: Array) -> tuple[Any, ...]:
            hidden, *rest = self.self_attn(
                hidden, bias, mask_BS, cache, layer, keys[0], output_attentions, head_mask
            )
            return apply_dropout(hidden, self.dropout, keys[1]), *rest

        def feed_forward(hidden: Array) -> tuple[Array]:
            hidden = self.fc2(ACTIVATIONS[self.activation](self.fc1(hidden)))
            return (apply_dropout(hidden, self.dropout, keys[2]),)

        hidden, weights, buffers = self._residual(hidden, self.self_attn_layer_norm, attend)
        (hidden,) = self._residual(hidden, self.final_layer_norm, feed_forward)
        return hidden, weights, buffers


class PositionEmbedding(PositionTable, Embedding):
    """The table of positions."""

    _check_ranges = staticmethod(inputs.check_ranges)

    @staticmethod
    def _rows_of(mask_BS: Array, past: int) -> Array:
        return position_rows(mask_BS.astype(bool), past, mask_BS.shape[1] - past)

    def __call__(
        self,
        attention_mask: Array,
        past_key_values_length: int | None = 0,
        position_ids: Array | None = None,
    ) -> Array:
        """Looks positions up.

        Args:
            attention_mask: (B, S) 1 for tokens, 0 for padding; positions follow from it.
            past_key_values_length: Tokens at its beginning that were looked up before. None: what
                comes first are rows of the table themselves, as the decoder knows them.
            position_ids: (B, T) positions, which the mask then does not say.

        Raises:
            InputError: The mask is none.
        """
        return super().__call__(self._rows(attention_mask, past_key_values_length, position_ids))


class FlaxOPTDecoder(DecoderMixin, nnx.Module):
    """Embeddings, the layers, the last norm and the projections around them.

    With `scan_layers`, `layers` is one layer whose parameters have a leading axis of N, run by
    `jax.lax.scan`: a deep model compiles in the time of a shallow one, and decodes more slowly.
    """

    def __init__(
        self, config: OPTConfig, implementation: str, scan_layers: bool, mesh: Mesh | None
    ):
        D, P = config.hidden_size, config.embed_dim
        self.config = config
        self.mesh = mesh
        self.implementation = implementation
        self.scan_layers = scan_layers
        self.gradient_checkpointing = config.gradient_checkpointing
        self.deterministic = True
        self.rngs = nnx.Rngs(dropout=0)
        self.embed_tokens = Embedding(config.vocab_size, P, config.pad_token_id, mesh)
        self.embed_positions = PositionEmbedding(
            config.max_position_embeddings + POSITION_OFFSET, D, mesh=mesh, axis="position"
        )
        self.project_out = Linear(D, P, False, mesh) if config.has_projections else None
        self.project_in = Linear(P, D, False, mesh) if config.has_projections else None
        self.final_layer_norm = make_norm(config) if config.has_final_layer_norm else None
        count = 1 if scan_layers else config.num_hidden_layers
        layers = [FlaxOPTDecoderLayer(config, implementation, mesh) for _ in range(count)]
        self.layers: Any = layers[0] if scan_layers else nnx.List(layers)

    @run_by_model
    def __call__(
        self,
        embeds: Array,
        position_ids: Array | None,
        mask_BS: Array | None,
        cache: KVCache | None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        head_mask: Sequence[Array] | None = None,
    ) -> FlaxOPTOutput:
        """Runs the decoder.

        Args:
            embeds: Token embeddings (B, T, P).
            position_ids: Positions (B, T), -1 for padding; None: they follow from the mask.
            mask_BS: bool (B, S), False at padding; None: no padding.
            cache: What came before; None: nothing.
            output_hidden_states: Return the states between the layers too.
            output_attentions: Return the attention weights too.
            deterministic: No dropout; None: as `model.train()` and `model.eval()` set it.
            rngs: Source of dropout; None: the model's own.
            head_mask: (H,) numbers for each layer, which its heads' weights are multiplied by.
        """
        count, past = embeds.shape[1], cache.length if cache else 0
        slots = cache.visible(count) if cache else count
        if position_ids is None:
            rows = position_rows(mask_BS, past, count)
        else:
            rows = position_ids + POSITION_OFFSET
        hidden = self._enter(embeds, rows)
        hidden = _spread(hidden, self.mesh)
        bias = make_bias(mask_BS, count, past, slots, hidden.dtype)
        keys = self._dropout_keys(deterministic, rngs)
        run = self._scan if self.scan_layers else self._unroll
        hidden, states, attentions, buffers = run(
            hidden, bias, mask_BS, cache, keys, output_attentions, head_mask
        )
        hidden = self._leave(hidden)
        filled = cache.filled(count) if cache else count
        if cache is not None:
            assert buffers is not None
            cache = cache.advance(count, mask_BS, *buffers)
        return FlaxOPTOutput(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(w[..., :filled] for w in attentions) if output_attentions else None,
        )

    def _dropout_keys(self, deterministic: bool | None, rngs: nnx.Rngs | None) -> Array | None:
        """One random key per layer, or None where nothing is dropped."""
        config = self.config
        if self.deterministic if deterministic is None else deterministic:
            return None
        if not (config.dropout or config.attention_dropout or config.layerdrop):
            return None
        key = (self.rngs if rngs is None else rngs).dropout()
        return jax.random.split(key, config.num_hidden_layers)

    def _layer(
        self, layer, hidden, bias, mask, cache, index, key, output_attentions, heads
    ):  # fmt: skip
        """One layer, dropped or recomputed in the backward pass where that is asked for."""

        def run(layer, hidden, bias, mask, cache, key, heads):
            return layer(hidden, bias, mask, cache, index, key, output_attentions, heads)

        call = nnx.remat(run) if self.gradient_checkpointing and cache is None else run
        new, weights, buffers = call(layer, hidden, bias, mask, cache, key, heads)
        new = _spread(new, self.mesh)
        if key is not None and self.config.layerdrop:
            dropped = jax.random.bernoulli(jax.random.fold_in(key, 3), self.config.layerdrop)
            new = jnp.where(dropped, hidden, new)
        return new, weights, buffers

    def _unroll(self, hidden, bias, mask, cache, keys, output_attentions, head_mask):
        """The layers one after the other: the fastest program."""
        states, attentions, buffers = [], [], []
        for i, layer in enumerate(self.layers):
            states.append(hidden)
            key = None if keys is None else keys[i]
            hidden, weights, written = self._layer(
                layer, hidden, bias, mask, cache, i, key, output_attentions,
                None if head_mask is None else head_mask[i],
            )  # fmt: skip
            attentions.append(weights)
            buffers.append(written)
        buffers = None if cache is None else tuple(zip(*buffers, strict=True))
        return hidden, states, tuple(attentions), buffers

    def _scan(self, hidden, bias, mask, cache, keys, output_attentions, head_mask):
        """One layer's program, run N times."""
        graph, state = nnx.split(self.layers)
        stacked = None
        if cache is not None and cache.keys:
            stacked = jnp.stack(cache.keys), jnp.stack(cache.values)
        heads = None if head_mask is None else jnp.stack(head_mask)

        def body(hidden, inputs):
            state, buffers, key, heads = inputs
            one = cache
            if cache is not None and cache.keys:
                one = replace(cache, keys=(buffers[0],), values=(buffers[1],))
            new, weights, written = self._layer(
                nnx.merge(graph, state), hidden, bias, mask, one, 0, key, output_attentions, heads
            )
            return new, (hidden, weights, written)

        each = state, stacked, keys, heads
        hidden, (states, weights, written) = jax.lax.scan(body, hidden, each)
        attentions = tuple(weights) if output_attentions else ()
        buffers = None if cache is None else tuple(tuple(b) for b in written)
        return hidden, list(states), attentions, buffers


def _spread(hidden_BTD: Array, mesh: Mesh | None) -> Array:
    """Splits states over a mesh: by rows, those of a single new token by features over "fsdp".

    Decoding then moves its few states from chip to chip, and the weights stay where they are.
    """
    B, T, D = hidden_BTD.shape
    if mesh is None or T > 1 or D % mesh.shape["fsdp"]:
        return constrain_rows(hidden_BTD, mesh)
    parts = PartitionSpec("data" if B % mesh.shape["data"] == 0 else None, None, "fsdp")
    return jax.lax.with_sharding_constraint(hidden_BTD, NamedSharding(mesh, parts))


class _LayerNorm(nnx.Module):
    def __init__(self, affine: bool):
        self.scale = nnx.Param(None) if affine else None
        self.bias = nnx.Param(None) if affine else None

    def __call__(self, hidden: Array) -> Array:
        wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
        centred = wide - wide.mean(-1, keepdims=True)
        out = centred * jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + 1e-5)
        if self.scale is not None and self.bias is not None:
            out = out * self.scale[...] + self.bias[...]
        return out.astype(hidden.dtype)


def make_norm(config: OPTConfig) -> _LayerNorm:
    """A layer norm as OPT has them: epsilon 1e-5, with or without scale and bias."""
    return _LayerNorm(config.layer_norm_elementwise_affine)
