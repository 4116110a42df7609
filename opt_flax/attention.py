"""Causal self-attention: projections, masks and the kernels behind one interface."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from opt_core.compatibility.calls import scale_heads
from opt_core.compatibility.parts import AttentionNames
from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_flax._private import load_splash_attention
from opt_flax.cache import KVCache
from opt_flax.linear import Linear, apply_dropout
from opt_flax.sharding import rows_axes

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")
_PIECE, _PIECES = 64, 4
"""Queries of a long text that are taken together, at least; and the most pieces of a text."""


class FlaxOPTAttention(AttentionNames, nnx.Module):
    """Multi-head causal self-attention of one layer."""

    def __init__(self, config: OPTConfig, implementation: str, mesh: Mesh | None = None):
        self.implementation = implementation
        self.mesh = mesh
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.attention_dropout
        D, bias = config.hidden_size, config.enable_bias
        self.k_proj = Linear(D, D, bias, mesh)
        self.v_proj = Linear(D, D, bias, mesh)
        self.q_proj = Linear(D, D, bias, mesh)
        self.out_proj = Linear(D, D, bias, mesh)

    def __call__(
        self,
        hidden_BTD: Array,
        bias_B1TS: Array | None,
        mask_BS: Array | None,
        cache: KVCache | None,
        layer: int,
        key: Array | None,
        output_attentions: bool,
        head_mask: Array | None = None,
    ) -> tuple[Array, Array | None, tuple[Array, Array] | None]:
        """Mixes every token with those before it.

        Args:
            hidden_BTD: Normalised hidden states.
            bias_B1TS: Added to the scores (`make_bias`); None: causality alone decides.
            mask_BS: bool, False at padding, for the kernels that take segments; None: no padding.
            cache: Where keys and values are kept; None: nothing came before.
            layer: Which of the cache's layers this is.
            key: Random key of dropout; None: no dropout.
            output_attentions: Return the attention weights too (this takes the eager path).
            head_mask: (H,) numbers that the heads' weights are multiplied by; None: all 1.

        Returns:
            The mixed states (B, T, D), the weights (B, H, T, S) or None, and the layer's new cache
            buffers or None.
        """
        B, T, D = hidden_BTD.shape
        query, key_states, value = (
            projection(hidden_BTD).reshape(B, T, self.num_heads, self.head_dim).swapaxes(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        buffers = None
        if cache is not None:
            buffers = cache.write(layer, key_states, value)
            if not cache.is_empty:
                key_states, value = buffers
        dropout = self.dropout if key is not None else 0.0
        weights = None
        if self.implementation == "flash_attention_2" and T > 1 and not output_attentions:
            mixed = flash(query, key_states, value, bias_B1TS, mask_BS, dropout, self.mesh)
        elif self.implementation != "eager" and not (dropout or output_attentions):
            mixed = sdpa(query, key_states, value, bias_B1TS, self.mesh)
        else:
            mixed, weights = eager(query, key_states, value, bias_B1TS, dropout, key)
        mixed, weights = scale_heads(mixed, weights, head_mask)
        mixed = self.out_proj(mixed.swapaxes(1, 2).reshape(B, T, D))
        return mixed, weights if output_attentions else None, buffers


def make_bias(
    mask_BS: Array | None, count: int, past: int | Array, slots: int, dtype: jnp.dtype
) -> Array | None:
    """A bias to add to the scores, or None where causality alone decides.

    Args:
        mask_BS: bool (B, S), False at padding; None if there is none.
        count: New tokens T.
        past: Slot of the first of them.
        slots: Slots S that are looked at; those behind the new tokens are not filled yet.
        dtype: Type of the scores.

    Returns:
        (B or 1, 1, T, S): 0 where a query may look and the lowest number where not. A query with
        nothing to look at (padding before the first token) looks at everything, so that its row
        is finite.
    """
    if mask_BS is None and isinstance(past, int) and past + count == slots and 1 in (count, slots):
        return None
    if mask_BS is None and isinstance(past, int) and past == 0 and count == slots:
        return None
    may = jnp.arange(slots)[None, :] <= past + jnp.arange(count)[:, None]
    may = may[None, None] if mask_BS is None else may & mask_BS[:, None, None, :]
    if mask_BS is not None:
        may = may | ~may.any(-1, keepdims=True)
    return jnp.where(may, 0, jnp.finfo(dtype).min).astype(dtype)


def eager(
    q_BHTK: Array,
    k_BHSK: Array,
    v_BHSK: Array,
    bias_B1TS: Array | None,
    dropout: float,
    key: Array | None,
) -> tuple[Array, Array]:
    """Attention spelled out, softmax in float32 or better; returns the weights (B, H, T, S) too."""
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    # OPT scales the query, not the scores: half precision overflows later that way.
    scores = jnp.einsum("bhtk,bhsk->bhts", q_BHTK * q_BHTK.shape[-1] ** -0.5, k_BHSK)
    wide = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    if bias_B1TS is not None:
        wide = wide + bias_B1TS
    elif T > 1:
        wide = jnp.where(jnp.tri(T, S, S - T, dtype=bool), wide, -jnp.inf)
    weights = jax.nn.softmax(wide, -1).astype(scores.dtype)
    mixed = jnp.einsum("bhts,bhsk->bhtk", apply_dropout(weights, dropout, key), v_BHSK)
    return mixed, weights


def sdpa(
    q_BHTK: Array,
    k_BHSK: Array,
    v_BHSK: Array,
    bias_B1TS: Array | None,
    mesh: Mesh | None = None,
) -> Array:
    """JAX's own attention; on a CPU spelled out, which needs no other order of keys and values.

    On a GPU a prompt goes to cuDNN's kernel where that takes it: scores are never held.
    """
    if _takes_cudnn(q_BHTK, k_BHSK, mesh):
        return flash(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, None, 0.0, mesh)
    states = (q_BHTK, k_BHSK, v_BHSK, bias_B1TS)
    return jax.lax.platform_dependent(*states, cpu=_by_pieces, default=_jax_sdpa)


def _takes_cudnn(q_BHTK: Array, k_BHSK: Array, mesh: Mesh | None) -> bool:
    """Whether these are a whole prompt in half precision, for a GPU that cuDNN has a kernel for.

    What continues a cache is left out: the kernel wants keys and values in another order.
    """
    T, K = q_BHTK.shape[2:]
    if platform_of(mesh) != "gpu" or q_BHTK.dtype not in (jnp.float16, jnp.bfloat16):
        return False
    if T == 1 or k_BHSK.shape[2] != T or K % 8 or K > 128:
        return False
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    major = str(device.compute_capability).partition(".")[0]
    return major.isdecimal() and int(major) >= 8  # AMD's are no numbers


def _jax_sdpa(q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, bias_B1TS: Array | None) -> Array:
    mixed = jax.nn.dot_product_attention(
        *(x.swapaxes(1, 2) for x in (q_BHTK, k_BHSK, v_BHSK)),
        bias=bias_B1TS,
        is_causal=bias_B1TS is None and q_BHTK.shape[2] > 1,
        implementation="xla",
    )
    return mixed.swapaxes(1, 2)


def _by_pieces(q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, bias_B1TS: Array | None) -> Array:
    """A long text in pieces, each with the keys up to its end.

    The keys behind it would only be multiplied to be masked.
    """
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    is_whole = isinstance(T, int) and isinstance(S, int) and T == S  # nothing came before
    count = min(_PIECES, T // _PIECE) if is_whole else 1
    if count < 2:
        return eager(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, 0.0, None)[0]
    mixed, starts = [], [T * i // count for i in range(count + 1)]
    for start, end in pairwise(starts):
        query, bias = q_BHTK[:, :, start:end], bias_B1TS
        if bias is not None:
            bias = bias[:, :, start:end, :end]
        mixed.append(eager(query, k_BHSK[:, :, :end], v_BHSK[:, :, :end], bias, 0.0, None)[0])
    return jnp.concatenate(mixed, 2)


def flash(
    q_BHTK: Array,
    k_BHSK: Array,
    v_BHSK: Array,
    bias_B1TS: Array | None,
    mask_BS: Array | None,
    dropout: float,
    mesh: Mesh | None = None,
) -> Array:
    """Attention that never holds the scores: cuDNN's kernel on a GPU, Pallas' on a TPU.

    On a mesh each device runs the kernel on its own rows and heads. What continues a cache
    (T < S) takes the plain path on a TPU. Queries that are padding come back as any finite number.

    Args:
        q_BHTK: Queries.
        k_BHSK: Keys.
        v_BHSK: Values.
        bias_B1TS: As for `eager`; the GPU kernel takes it.
        mask_BS: bool, False at padding; the TPU kernel takes it.
        dropout: The attention dropout that is wanted: there is none.
        mesh: Where the model is; None: JAX's default device.

    Raises:
        ConfigError: Neither on a GPU in half precision nor on a TPU, or with dropout.
    """
    platform = platform_of(mesh)
    check_flash(platform, q_BHTK.dtype, dropout)
    (B, H, T, _), S = q_BHTK.shape, k_BHSK.shape[2]
    if platform == "tpu" and T != S:
        return sdpa(q_BHTK, k_BHSK, v_BHSK, bias_B1TS)
    kernel, extra = (_pallas, mask_BS) if platform == "tpu" else (_cudnn, bias_B1TS)
    if mesh is None:
        return kernel(q_BHTK, k_BHSK, v_BHSK, extra)
    rows = rows_axes(B, mesh)
    states = PartitionSpec(rows, "model" if H % mesh.shape["model"] == 0 else None)
    specs = (
        states,
        states,
        states,
        PartitionSpec(rows if extra is not None and len(extra) == B else None),
    )
    run = jax.shard_map(kernel, mesh=mesh, in_specs=specs, out_specs=states, check_vma=False)
    return run(q_BHTK, k_BHSK, v_BHSK, extra)


def check_flash(platform: str, dtype: jnp.dtype, dropout: float = 0.0) -> None:
    """Says why `flash` cannot run, if it cannot."""
    name = 'attn_implementation="flash_attention_2"'
    if platform not in ("gpu", "tpu"):
        raise ConfigError(f'{name} needs a GPU or a TPU, received {platform}; use "sdpa"')
    if platform == "gpu" and dtype not in (jnp.float16, jnp.bfloat16):
        raise ConfigError(
            f"{name} needs float16 or bfloat16 on a GPU, received {jnp.dtype(dtype).name}; "
            'use "sdpa"'
        )
    if dropout:
        raise ConfigError(
            f"{name} has no dropout of the attention weights: expected attention_dropout=0 in "
            f'training, received {dropout}; or use "sdpa"'
        )


def platform_of(mesh: Mesh | None) -> str:
    """The kind of the devices: "cpu", "gpu" or "tpu"; None: JAX's default ones."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _cudnn(q_BHTK: Array, k_BHSK: Array, v_BHSK: Array, bias_B1TS: Array | None) -> Array:
    """CuDNN's kernel; with a bias it can be differentiated at even lengths only."""
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    states = [x.swapaxes(1, 2) for x in (q_BHTK, k_BHSK, v_BHSK)]
    if bias_B1TS is not None and (T % 2 or S % 2):
        states = [jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in states]
        lowest = jnp.finfo(bias_B1TS.dtype).min
        free = ((0, 0), (0, 0), (0, T % 2), (0, S % 2))
        bias_B1TS = jnp.pad(bias_B1TS, free, constant_values=lowest)
    mixed = jax.nn.dot_product_attention(
        *states, bias=bias_B1TS, is_causal=bias_B1TS is None, implementation="cudnn"
    )
    return mixed[:, :T].swapaxes(1, 2)


def _pallas(
    q_BHTK: Array,
    k_BHTK: Array,
    v_BHTK: Array,
    mask_BT: Array | None,
    interpret: bool = False,
) -> Array:
    """Pallas' splash attention; padding is a segment of its own, which attends to itself.

    With `interpret` the kernel runs anywhere, slowly.
    """
    splash, masks = load_splash_attention()
    _, H, T, K = q_BHTK.shape
    # Whole tiles of 128 lanes; causality hides what is added on the right.
    length = -(-T // 128) * 128
    free = ((0, 0), (0, 0), (0, length - T), (0, 0))
    states = [jnp.pad(x, free) for x in (q_BHTK * K**-0.5, k_BHTK, v_BHTK)]
    segments = None
    if mask_BT is not None:
        ids = jnp.pad(mask_BT, ((0, 0), (0, length - T))).astype(jnp.int32)
        segments = splash.SegmentIds(ids, ids)
    block = next(size for size in (512, 256, 128) if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block,
        block_q_dkv=block, block_kv_dkv=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * H)
    kernel = splash.make_splash_mha_single_device(mask=mask, block_sizes=sizes, interpret=interpret)
    mixed: Any = jax.vmap(kernel)(*states, segments)
    return mixed[:, :, :T]
