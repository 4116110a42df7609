"""Causal self-attention: projections, masks and the kernels behind one interface."""

from itertools import pairwise
from typing import Any

import keras
import tensorflow as tf

from opt_core.compatibility.calls import scale_heads
from opt_core.compatibility.parts import AttentionNames
from opt_core.config import OPTConfig
from opt_tf.cache import KVCache
from opt_tf.linear import Linear, apply_dropout, sizes

IMPLEMENTATIONS = ("eager", "sdpa")
_PIECE, _PIECES = 128, 4
"""Queries of a long text that are taken together, at least; and the most pieces of a text."""


class TFOPTAttention(AttentionNames, keras.layers.Layer):
    """Multi-head causal self-attention of one layer."""

    def __init__(self, config: OPTConfig, implementation: str, **options: Any):
        super().__init__(**options)
        self.implementation = implementation
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.attention_dropout
        D, bias, dtype = config.hidden_size, config.enable_bias, self.dtype_policy
        self.k_proj = Linear(D, D, bias, name="k_proj", dtype=dtype)
        self.v_proj = Linear(D, D, bias, name="v_proj", dtype=dtype)
        self.q_proj = Linear(D, D, bias, name="q_proj", dtype=dtype)
        self.out_proj = Linear(D, D, bias, name="out_proj", dtype=dtype)

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables."""
        for projection in (self.k_proj, self.v_proj, self.q_proj, self.out_proj):
            projection.build()

    def call(
        self,
        hidden_BTD: tf.Tensor,
        bias_B1TS: tf.Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        seed: tf.Tensor | None = None,
        output_attentions: bool = False,
        head_mask: tf.Tensor | None = None,
    ) -> tuple[tf.Tensor, tf.Tensor | None, tuple[tf.Tensor, tf.Tensor] | None]:
        """Mixes every token with those before it.

        Args:
            hidden_BTD: Normalised hidden states.
            bias_B1TS: Added to the scores (`make_bias`); None: every query sees every key.
            cache: Where keys and values are kept; None: nothing came before.
            layer: Which of the cache's layers this is.
            seed: int32 (2,), of dropout; None: no dropout.
            output_attentions: Return the attention weights too (this takes the eager path).
            head_mask: (H,) numbers that the heads' weights are multiplied by; None: all 1.

        Returns:
            The mixed states (B, T, D), the weights (B, H, T, S) or None, and the layer's new cache
            buffers or None.
        """
        B, T, D = sizes(hidden_BTD)
        query, key, value = (
            tf.transpose(
                tf.reshape(projection(hidden_BTD), (B, T, self.num_heads, self.head_dim)),
                (0, 2, 1, 3),
            )
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        buffers = None
        if cache is not None:
            buffers = cache.write(layer, key, value)
            if not cache.is_empty:
                key, value = (buffer[:, :, : cache.visible(T)] for buffer in buffers)
        weights = None
        drops = seed is not None and self.dropout > 0
        if output_attentions or self.implementation == "eager" or drops:
            mixed, weights = eager(query, key, value, bias_B1TS, self.dropout, seed)
        else:
            mixed = sdpa(query, key, value, bias_B1TS)
        mixed, weights = scale_heads(mixed, weights, head_mask)
        mixed = self.out_proj(tf.reshape(tf.transpose(mixed, (0, 2, 1, 3)), (B, T, D)))
        return mixed, weights if output_attentions else None, buffers


def make_bias(
    mask_BS: tf.Tensor | None, count: int, past: int | tf.Tensor, slots: int, dtype: tf.DType
) -> tf.Tensor | None:
    """A bias to add to the scores, or None where every query sees every key.

    Args:
        mask_BS: bool (B, S), False at padding; None if there is none.
        count: New tokens T.
        past: Slot of the first of them.
        slots: Slots S that are looked at; those behind the new tokens are not filled yet.
        dtype: Type of the scores.

    Returns:
        (B or 1, 1, T, S): 0 where a query may look and -inf where not. A query with nothing to
        look at (padding before the first token) looks at everything, so that its row is finite.
    """
    if mask_BS is None and isinstance(past, int) and isinstance(count, int) and count == 1:
        return None
    may = (tf.range(slots)[None] <= past + tf.range(count)[:, None])[None, None]
    if mask_BS is not None:
        may = may & tf.expand_dims(tf.expand_dims(mask_BS, 1), 1)  # LiteRT knows no other way
        may = may | ~tf.reduce_any(may, -1, keepdims=True)
    return tf.where(may, tf.constant(0, dtype), tf.constant(float("-inf"), dtype))


def eager(
    q_BHTK: tf.Tensor,
    k_BHSK: tf.Tensor,
    v_BHSK: tf.Tensor,
    bias_B1TS: tf.Tensor | None,
    dropout: float,
    seed: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Attention spelled out, softmax in float32 or better; returns the weights (B, H, T, S) too."""
    # OPT scales the query, not the scores: half precision overflows later that way.
    scores = tf.matmul(q_BHTK * sizes(q_BHTK)[-1] ** -0.5, k_BHSK, transpose_b=True)
    if bias_B1TS is not None:
        scores = scores + bias_B1TS
    wide = tf.cast(scores, tf.float64 if scores.dtype == tf.float64 else tf.float32)
    weights = tf.cast(tf.nn.softmax(wide, -1), scores.dtype)
    return tf.matmul(apply_dropout(weights, dropout, seed), v_BHSK), weights


def sdpa(
    q_BHTK: tf.Tensor, k_BHSK: tf.Tensor, v_BHSK: tf.Tensor, bias_B1TS: tf.Tensor | None
) -> tf.Tensor:
    """Attention without its weights: TensorFlow has no kernel of its own for it.

    A long text is taken in pieces, each with the keys up to its end: those behind it would only be
    multiplied to be masked.
    """
    T, S = sizes(q_BHTK)[2], sizes(k_BHSK)[2]
    is_whole = isinstance(T, int) and isinstance(S, int) and T == S  # nothing came before
    count = min(_PIECES, T // _PIECE) if is_whole and bias_B1TS is not None else 1
    if count < 2:
        return eager(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, 0.0, None)[0]
    assert bias_B1TS is not None
    mixed, starts = [], [T * i // count for i in range(count + 1)]
    for start, end in pairwise(starts):
        query, bias = q_BHTK[:, :, start:end], bias_B1TS[:, :, start:end, :end]
        mixed.append(eager(query, k_BHSK[:, :, :end], v_BHSK[:, :, :end], bias, 0.0, None)[0])
    return tf.concat(mixed, 2)
