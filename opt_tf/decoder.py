"""The decoder: layers, norms, embeddings and projections, and what a model returns."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from opt_core.compatibility.parts import PositionTable, run_by_model
from opt_core.config import OPTConfig
from opt_core.decoder import DecoderLayerMixin, DecoderMixin
from opt_core.outputs import ModelOutput
from opt_core.params import POSITION_OFFSET
from opt_tf import inputs
from opt_tf._private import register_pytree
from opt_tf.attention import TFOPTAttention, make_bias
from opt_tf.cache import KVCache, position_rows
from opt_tf.linear import Embedding, Linear, apply_dropout, sizes

ACTIVATIONS: dict[str, Callable[[tf.Tensor], tf.Tensor]] = {
    "relu": tf.nn.relu,
    "gelu": partial(tf.nn.gelu, approximate=False),
    "gelu_new": partial(tf.nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(tf.nn.gelu, approximate=True),
    "silu": tf.nn.silu,
    "swish": tf.nn.silu,
}


class TFOPTOutput(ModelOutput[tf.Tensor, KVCache]):
    """The output of a model: see `ModelOutput` for its fields."""


register_pytree(TFOPTOutput)


class TFOPTDecoderLayer(DecoderLayerMixin, keras.layers.Layer):
    """One layer: attention and feed-forward, each with a norm and a residual connection."""

    def __init__(self, config: OPTConfig, implementation: str, **options: Any):
        super().__init__(**options)
        D, bias, dtype = config.hidden_size, config.enable_bias, self.dtype_policy
        self.norm_first = config.do_layer_norm_before
        self.dropout = config.dropout
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = TFOPTAttention(config, implementation, name="self_attn", dtype=dtype)
        self.self_attn_layer_norm = make_norm(config, name="self_attn_layer_norm", dtype=dtype)
        self.fc1 = Linear(D, config.ffn_dim, bias, name="fc1", dtype=dtype)
        self.fc2 = Linear(config.ffn_dim, D, bias, name="fc2", dtype=dtype)
        self.final_layer_norm = make_norm(config, name="final_layer_norm", dtype=dtype)
        self.width = D

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        self.self_attn.build()
        self.self_attn_layer_norm.build((None, self.width))
        self.fc1.build()
        self.fc2.build()
        self.final_layer_norm.build((None, self.width))

    def call(
        self,
        hidden: tf.Tensor,
        bias: tf.Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        seed: tf.Tensor | None = None,
        output_attentions: bool = False,
        head_mask: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor | None, tuple[tf.Tensor, tf.Tensor] | None]:
        """Returns the new states (B, T, D), the attention weights if asked for, and the buffers."""
        seeds = (None,) * 3 if seed is None else tuple(_split(seed, 3))

        def attend(hidden: tf.Tensor) -> tuple[Any, ...]:
            hidden, *rest = self.self_attn(
                hidden, bias_B1TS=bias, cache=cache, layer=layer, seed=seeds[0],
                output_attentions=output_attentions, head_mask=head_mask,
            )  # fmt: skip
            return apply_dropout(hidden, self.dropout, seeds[1]), *rest

        def feed_forward(hidden: tf.Tensor) -> tuple[tf.Tensor]:
            hidden = self.fc2(self.activation(self.fc1(hidden)))
            return (apply_dropout(hidden, self.dropout, seeds[2]),)

        hidden, weights, buffers = self._residual(hidden, self.self_attn_layer_norm, attend)
        (hidden,) = self._residual(hidden, self.final_layer_norm, feed_forward)
        return hidden, weights, buffers


class PositionEmbedding(PositionTable, Embedding):
    """The table of positions."""

    _check_ranges = staticmethod(inputs.check_ranges)

    @staticmethod
    def _rows_of(mask_BS: tf.Tensor, past: int) -> tf.Tensor:
        return position_rows(tf.cast(mask_BS, tf.bool), past, sizes(mask_BS)[1] - past)

    def __call__(self, attention_mask: Any, past_key_values_length: Any = 0, **kwargs: Any) -> Any:
        """Looks positions up (`call`); Keras itself takes no numbers by place."""
        return super().__call__(
            attention_mask, past_key_values_length=past_key_values_length, **kwargs
        )

    def call(
        self,
        attention_mask: tf.Tensor,
        past_key_values_length: int | None = 0,
        position_ids: tf.Tensor | None = None,
    ) -> tf.Tensor:
        """Looks positions up.

        Args:
            attention_mask: (B, S) 1 for tokens, 0 for padding; positions follow from it.
            past_key_values_length: Tokens at its beginning that were looked up before. None: what
                comes first are rows of the table themselves, as the decoder knows them.
            position_ids: (B, T) positions, which the mask then does not say.

        Raises:
            InputError: The mask is none.
        """
        return super().call(self._rows(attention_mask, past_key_values_length, position_ids))


class TFOPTDecoder(DecoderMixin, keras.layers.Layer):
    """Embeddings, the layers, the last norm and the projections around them."""

    def __init__(self, config: OPTConfig, implementation: str, **options: Any):
        super().__init__(**options)
        D, P, dtype = config.hidden_size, config.embed_dim, self.dtype_policy
        self.config = config
        self.gradient_checkpointing = config.gradient_checkpointing
        self.dropout_seeds = keras.random.SeedGenerator(name="dropout_seeds")
        self.embed_tokens = Embedding(
            config.vocab_size, P, config.pad_token_id, name="embed_tokens", dtype=dtype
        )
        self.embed_positions = PositionEmbedding(
            config.max_position_embeddings + POSITION_OFFSET,
            D,
            name="embed_positions",
            dtype=dtype,
        )
        self.project_out = self.project_in = self.final_layer_norm = None
        if config.has_projections:
            self.project_out = Linear(D, P, False, name="project_out", dtype=dtype)
            self.project_in = Linear(P, D, False, name="project_in", dtype=dtype)
        if config.has_final_layer_norm:
            self.final_layer_norm = make_norm(config, name="final_layer_norm", dtype=dtype)
        # `layers` is what Keras calls all the parts of a model.
        self.blocks = [
            TFOPTDecoderLayer(config, implementation, name=f"blocks_{i}", dtype=dtype)
            for i in range(config.num_hidden_layers)
        ]

    @property
    def layers(self) -> list[TFOPTDecoderLayer]:
        """The layers, as `transformers` and the other backends call them."""
        return self.blocks

    def __dir__(self) -> list[str]:
        # Keras saves whatever layers it finds here, and would save these twice.
        return [name for name in super().__dir__() if name != "layers"]

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        for part in (self.embed_tokens, self.embed_positions, *self.blocks):
            part.build()
        if self.project_in is not None and self.project_out is not None:
            self.project_out.build()
            self.project_in.build()
        if self.final_layer_norm is not None:
            self.final_layer_norm.build((None, self.config.hidden_size))

    @run_by_model
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the decoder (`call`); Keras itself would complain of other arguments first."""
        return super().__call__(*args, **kwargs)

    def call(
        self,
        embeds: tf.Tensor,
        position_ids: tf.Tensor | None = None,
        mask_BS: tf.Tensor | None = None,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        training: bool | None = None,
        head_mask: Sequence[tf.Tensor] | None = None,
    ) -> TFOPTOutput:
        """Runs the decoder.

        Args:
            embeds: Token embeddings (B, T, P).
            position_ids: Positions (B, T), -1 for padding; None: they follow from the mask.
            mask_BS: bool (B, S), False at padding; None: no padding.
            cache: What came before; None: nothing.
            output_hidden_states: Return the states between the layers too.
            output_attentions: Return the attention weights too.
            training: Whether to apply dropout and layerdrop.
            head_mask: (H,) numbers for each layer, which its heads' weights are multiplied by.
        """
        count = sizes(embeds)[1]
        past, slots = (cache.length, cache.visible(count)) if cache else (0, count)
        if position_ids is None:
            rows = position_rows(mask_BS, past, count)
        else:
            rows = position_ids + POSITION_OFFSET
        hidden = self._enter(embeds, rows)
        bias = make_bias(mask_BS, count, past, slots, hidden.dtype)
        seeds = self._seeds() if training else [None] * len(self.blocks)
        states, attentions, buffers = [], [], []
        for i, (block, seed) in enumerate(zip(self.blocks, seeds, strict=True)):
            states.append(hidden)

            def run(hidden, block=block, i=i, seed=seed):
                return block(
                    hidden, bias=bias, cache=cache, layer=i, seed=seed,
                    output_attentions=output_attentions,
                    head_mask=None if head_mask is None else head_mask[i],
                )  # fmt: skip

            if training and self.gradient_checkpointing and not (cache or output_attentions):
                new: Any = keras.remat(lambda x, run=run: run(x)[0])(hidden)
                weights = written = None
            else:
                new, weights, written = run(hidden)
            if seed is not None and self.config.layerdrop:
                is_dropped = tf.random.stateless_uniform((), seed) < self.config.layerdrop
                new = tf.where(is_dropped, hidden, new)
            hidden = new
            attentions.append(weights)
            buffers.append(written)
        hidden = self._leave(hidden)
        return TFOPTOutput(
            last_hidden_state=hidden,
            past_key_values=cache.advance(count, mask_BS, *zip(*buffers, strict=True))
            if cache
            else None,
            hidden_states=(*states, hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def _seeds(self) -> list[tf.Tensor | None]:
        """One random seed per layer, or None where nothing is dropped."""
        config, count = self.config, len(self.blocks)
        if not (config.dropout or config.attention_dropout or config.layerdrop):
            return [None] * count
        seed: Any = tf.cast(self.dropout_seeds.next(), tf.int32)
        replica = tf.distribute.get_replica_context()
        if replica is not None:  # each replica drops values of its own
            seed = tf.random.fold_in(seed, replica.replica_id_in_sync_group)
        return list(_split(seed, count))


def make_norm(config: OPTConfig, **options: Any) -> keras.layers.LayerNormalization:
    """A layer norm as OPT has them: epsilon 1e-5, with or without gamma and beta."""
    affine = config.layer_norm_elementwise_affine
    return keras.layers.LayerNormalization(epsilon=1e-5, center=affine, scale=affine, **options)


def _split(seed: tf.Tensor, count: int) -> list[tf.Tensor]:
    return tf.unstack(tf.random.split(seed, count)) if count else []
