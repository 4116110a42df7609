"""Causal self-attention: projections, masks and the kernels behind one interface."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention import SDPBackend, sdpa_kernel

from opt_core.compatibility.calls import scale_heads
from opt_core.compatibility.parts import AttentionNames
from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_torch.cache import KVCache
from opt_torch.linear import apply_linear
from opt_torch.quantization import fused_linear

IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2")


class OPTAttention(AttentionNames, nn.Module):
    """Multi-head causal self-attention of one layer."""

    def __init__(self, config: OPTConfig, implementation: str):
        super().__init__()
        self.implementation = implementation
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = config.attention_dropout
        self.mesh: DeviceMesh | None = None
        D, bias = config.hidden_size, config.enable_bias
        self.k_proj = nn.Linear(D, D, bias=bias)
        self.v_proj = nn.Linear(D, D, bias=bias)
        self.q_proj = nn.Linear(D, D, bias=bias)
        self.out_proj = nn.Linear(D, D, bias=bias)

    def split_heads(self, mesh: DeviceMesh) -> None:
        """Computes a part of the heads only, the others being other processes'.

        Args:
            mesh: These processes; there are no more heads for one than for another.
        """
        self.mesh, self.num_heads = mesh, self.num_heads // mesh.size()

    def forward(
        self,
        hidden_BTD: Tensor,
        bias_B1TS: Tensor | None,
        mask_BS: Tensor | None,
        cache: KVCache | None,
        layer: int,
        output_attentions: bool,
        head_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Mixes every token with those before it.

        Args:
            hidden_BTD: Normalised hidden states.
            bias_B1TS: Added to the scores (`make_bias`); None: causality alone decides.
            mask_BS: bool, False at padding, for the kernels that take lengths; None: no padding.
            cache: Where keys and values are kept; None: nothing came before.
            layer: Which of the cache's layers this is.
            output_attentions: Return the attention weights too (this takes the eager path).
            head_mask: (H,) numbers that the heads' weights are multiplied by; None: all 1.

        Returns:
            The mixed states (B, T, D), and the weights (B, H, T, S) or None.
        """
        B, T, _ = hidden_BTD.shape
        query, key, value = (
            states.view(B, T, self.num_heads, self.head_dim).transpose(1, 2)
            for states in fused_linear((self.q_proj, self.k_proj, self.v_proj), hidden_BTD)
        )
        if cache is not None:
            key, value = cache.write(layer, key, value)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if output_attentions or self.implementation == "eager":
            mixed, weights = eager(query, key, value, bias_B1TS, dropout)
        elif self.implementation == "flash_attention_2":
            mixed = flash(query, key, value, mask_BS, dropout)
        else:
            mixed = sdpa(query, key, value, bias_B1TS, dropout)
        if self.mesh is not None and head_mask is not None:
            head_mask = head_mask.tensor_split(self.mesh.size())[self.mesh.get_local_rank()]
        mixed, weights = scale_heads(mixed, weights, head_mask)
        mixed = apply_linear(self.out_proj, mixed.transpose(1, 2).reshape(B, T, -1))
        if not output_attentions or weights is None:
            return mixed, None
        if self.mesh is not None:
            from torch.distributed.tensor import DTensor, Shard

            weights = DTensor.from_local(weights, self.mesh, [Shard(1)]).full_tensor()
        return mixed, weights


def make_bias(
    mask_BS: Tensor | None,
    count: int,
    past: int,
    slots: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor | None:
    """A bias to add to the scores, or None where causality alone decides.

    Without a mask none is built, because fast causal kernels refuse one (transformers #48924).

    Args:
        mask_BS: bool (B, S), False at padding; None if there is none.
        count: New tokens T.
        past: Slot of the first of them.
        slots: Slots S that are looked at, the new tokens' last.
        dtype: Type of the scores.
        device: Where the scores are.

    Returns:
        (B or 1, 1, T, S): 0 where a query may look and -inf where not. A query with nothing to
        look at (padding before the first token) looks at everything, so that its row is finite.
    """
    if mask_BS is None and (past == 0 or count == 1):
        return None
    may_TS = torch.ones(count, slots, dtype=torch.bool, device=device).tril(past)
    may = may_TS[None, None] if mask_BS is None else may_TS & mask_BS[:, None, None, :]
    if mask_BS is not None:
        may = may | ~may.any(-1, keepdim=True)
    return torch.zeros(may.shape, dtype=dtype, device=device).masked_fill_(~may, float("-inf"))


def eager(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_B1TS: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Attention spelled out, softmax in float32 or better; returns the weights (B, H, T, S) too."""
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    # OPT scales the query, not the scores: half precision overflows later that way.
    scores = (q_BHTK * q_BHTK.shape[-1] ** -0.5) @ k_BHSK.transpose(2, 3)
    if bias_B1TS is not None:
        scores = scores + bias_B1TS
    elif T > 1:
        future = torch.ones(T, S, dtype=torch.bool, device=scores.device).triu(S - T + 1)
        scores = scores.masked_fill(future, float("-inf"))
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, -1, dtype=wide).to(scores.dtype)
    return F.dropout(weights, dropout) @ v_BHSK, weights


def sdpa(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, bias_B1TS: Tensor | None, dropout: float
) -> Tensor:
    """PyTorch's fused attention; it picks the kernel."""
    # Not `and`: while a program is traced a size may be a symbol or a tensor.
    is_causal = not (bias_B1TS is not None or q_BHTK.shape[2] == 1)
    return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v_BHSK, bias_B1TS, dropout, is_causal)


def flash(
    q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BS: Tensor | None, dropout: float
) -> Tensor:
    """FlashAttention-2 through PyTorch's own kernels: no padding, or padding packed away.

    Padded queries come back as zeros.

    Raises:
        ConfigError: Not on a CUDA device, not in half precision, or dropout together with padding.
    """
    check_flash(q_BHTK.device, q_BHTK.dtype)
    T, S = q_BHTK.shape[2], k_BHSK.shape[2]
    if mask_BS is None and T in (1, S):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                q_BHTK, k_BHSK, v_BHSK, dropout_p=dropout, is_causal=T > 1
            )
    if dropout:
        raise ConfigError(
            "flash_attention_2 has no attention_dropout for padded batches; "
            'set attention_dropout=0 or attn_implementation="sdpa"'
        )
    if mask_BS is None:
        mask_BS = q_BHTK.new_ones(q_BHTK.shape[0], S, dtype=torch.bool)
    return packed(q_BHTK, k_BHSK, v_BHSK, mask_BS)


def packed(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask_BS: Tensor) -> Tensor:
    """Attention over the real tokens only, all rows end to end in one sequence.

    Args:
        q_BHTK: Queries of the newest T of S tokens.
        k_BHSK: Keys.
        v_BHSK: Values.
        mask_BS: bool, False at padding.
    """
    # It brings triton, whose LLVM ends the process where TensorFlow is loaded already.
    from torch.nn.attention.varlen import varlen_attn

    new_BT = mask_BS[:, -q_BHTK.shape[2] :]
    query, key, value = (
        x.transpose(1, 2)[mask]
        for x, mask in ((q_BHTK, new_BT), (k_BHSK, mask_BS), (v_BHSK, mask_BS))
    )
    q_starts, k_starts = (
        F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32) for mask in (new_BT, mask_BS)
    )
    T, S = new_BT.shape[1], mask_BS.shape[1]
    # (-1, 0): a query sees every earlier key, the last query being aligned with the last key.
    mixed = varlen_attn(query, key, value, q_starts, k_starts, T, S, window_size=(-1, 0))
    assert isinstance(mixed, Tensor)  # a tuple comes only where `return_aux` asks for it
    out = torch.zeros_like(q_BHTK.transpose(1, 2))
    out[new_BT] = mixed
    return out.transpose(1, 2)


def check_flash(device: torch.device, dtype: torch.dtype) -> None:
    """Says why FlashAttention-2 cannot run here, if it cannot."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise ConfigError(
            'attn_implementation="flash_attention_2" needs a CUDA device and float16 or bfloat16, '
            f'received {device.type} and {str(dtype).removeprefix("torch.")}; use "sdpa"'
        )
