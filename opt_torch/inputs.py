"""Model inputs: made into tensors and checked before anything is computed."""

from typing import Any

import torch
from torch import Tensor

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_torch.cache import KVCache


def check_inputs(
    config: OPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    cache: KVCache | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Turns arrays and lists into tensors on the model's device and checks shapes and ranges.

    Args:
        config: The model's configuration.
        device: Where the model is.
        dtype: Type of its weights.
        input_ids: (B, T) ids, or None.
        attention_mask: (B, T) or (B, past + T), or None.
        position_ids: (B, T), or None.
        inputs_embeds: (B, T, P), or None.
        cache: What came before, or None.

    Returns:
        The four inputs as tensors or None, the mask as bool.

    Raises:
        InputError: What does not fit, expected and received.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise InputError("expected either input_ids or inputs_embeds, received both or neither")
    ids = as_integers("input_ids", input_ids, device)
    if ids is not None:
        check_range("input_ids", ids, 0, config.vocab_size - 1, f"vocab_size={config.vocab_size}")
        B, T = ids.shape
    else:
        inputs_embeds = as_tensor("inputs_embeds", inputs_embeds, device).to(dtype)
        if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != config.embed_dim:
            raise InputError(
                f"inputs_embeds: expected shape (B, T, {config.embed_dim}), "
                f"received {tuple(inputs_embeds.shape)}"
            )
        B, T = inputs_embeds.shape[:2]
    if B == 0 or T == 0:
        raise InputError(
            f"the input is empty: expected rows with tokens, received shape ({B}, {T})"
        )
    past = 0 if cache is None else cache.length
    positions = as_integers("position_ids", position_ids, device)
    if positions is not None:
        if positions.shape[1] != T or positions.shape[0] not in (1, B):
            raise InputError(
                f"position_ids: expected shape ({B}, {T}), received {tuple(positions.shape)}"
            )
        window = config.max_position_embeddings
        check_range("position_ids", positions, -1, window - 1, f"max_position_embeddings={window}")
    mask = as_integers("attention_mask", attention_mask, device)
    if mask is not None:
        if tuple(mask.shape) not in ((B, T), (B, past + T)):
            raise InputError(
                f"attention_mask: expected shape ({B}, {T})"
                + (f" or ({B}, {past + T})" if past else "")
                + f", received {tuple(mask.shape)}"
            )
        check_range("attention_mask", mask, 0, 1, "1 for tokens and 0 for padding")
        mask = mask.bool()
    if cache is not None:
        check_cache(config, dtype, cache, B, T)
    return ids, mask, positions, inputs_embeds


def check_cache(
    config: OPTConfig, dtype: torch.dtype, cache: KVCache, rows: int, count: int
) -> None:
    """Refuses a cache that another model made, that was continued already, or that is too small.

    Args:
        config: The model's configuration.
        dtype: Type of its weights.
        cache: The cache.
        rows: Rows B of the input.
        count: New tokens T.
    """
    keys = cache.keys[0]
    made = (len(cache.keys), keys.shape[1], keys.shape[3], keys.dtype)
    expected = (config.num_hidden_layers, config.num_attention_heads, config.head_dim, dtype)
    if made != expected:
        raise InputError(
            "past_key_values is of another model: expected (layers, heads, head size, dtype) "
            f"{expected}, received {made}"
        )
    if keys.shape[0] != rows:
        raise InputError(f"past_key_values holds {keys.shape[0]} rows, the input has {rows}")
    cache.check_intact()
    if count and cache.frontier[0] != cache.length:
        raise InputError(
            f"past_key_values was continued already (it holds {cache.length} tokens, its newest "
            f"successor {cache.frontier[0]}); pass the one that the last call returned"
        )
    if cache.length + count > cache.max_length:
        raise InputError(
            f"past_key_values has {cache.max_length} slots; "
            f"{cache.length} are taken and {count} more are needed"
        )


def check_prefix(
    config: OPTConfig, dtype: torch.dtype, cache: Any, ids_BT: Tensor, mask_BT: Tensor | None
) -> None:
    """Refuses a cache that cannot hold the beginning of some prompts.

    Args:
        config: The model's configuration.
        dtype: Type of its weights.
        cache: What the caller passed as `past_key_values`.
        ids_BT: The whole prompts.
        mask_BT: bool, False at padding; None if nothing is padded.
    """
    if not isinstance(cache, KVCache):
        raise InputError(
            f"past_key_values: expected a cache of this model, received {type(cache).__name__}"
        )
    rows, used, (B, T) = cache.keys[0].shape[0], cache.length, ids_BT.shape
    check_cache(config, dtype, cache, rows, 0)
    if rows not in (1, B):
        raise InputError(f"past_key_values holds {rows} rows, the input has {B}")
    if used >= T:
        raise InputError(
            f"past_key_values holds {used} tokens: expected input_ids that begin with them and go "
            f"on, received {T} tokens"
        )
    before = torch.ones(1, used, dtype=torch.bool, device=ids_BT.device)
    seen = before if cache.mask is None else cache.mask[:, :used]
    given = before if mask_BT is None else mask_BT[:, :used]
    if bool((seen != given).any()):
        raise InputError("attention_mask and past_key_values disagree about where padding is")


def full_mask(mask_BT: Tensor | None, count: int, cache: KVCache | None) -> Tensor | None:
    """The mask over everything: what the cache remembers and the new tokens.

    Args:
        mask_BT: bool mask of the new tokens, or of the past ones too; None: they are all real.
        count: New tokens T.
        cache: What came before, or None.

    Returns:
        bool (B, past + T), or None where nothing is padded.
    """
    past = 0 if cache is None else cache.length
    if mask_BT is None:
        return None if cache is None or cache.mask is None else cache.mask[:, : past + count]
    if mask_BT.shape[1] == count and cache is not None and past:
        before = (
            mask_BT.new_ones(mask_BT.shape[0], past) if cache.mask is None else cache.mask[:, :past]
        )
        mask_BT = torch.cat([before, mask_BT], 1)
    # A mask of ones would only keep the fast causal kernels from running.
    return None if is_known(mask_BT) and bool(mask_BT.all()) else mask_BT


def check_window(config: OPTConfig, mask_BS: Tensor | None, length: int) -> None:
    """Refuses a sequence that has more tokens than the model has positions.

    Args:
        config: The model's configuration.
        mask_BS: bool, False at padding; None if there is none.
        length: Tokens S in all, padding included.
    """
    window = config.max_position_embeddings
    if length <= window or (mask_BS is not None and not is_known(mask_BS)):
        return
    longest = length if mask_BS is None else int(mask_BS.sum(1).max())
    if longest > window:
        raise InputError(f"a sequence of {longest} tokens exceeds max_position_embeddings={window}")


def as_integers(name: str, values: Any, device: torch.device) -> Tensor | None:
    """A 2-D integer tensor on the device, or None."""
    if values is None:
        return None
    tensor = as_tensor(name, values, device)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.ndim != 2:
        raise InputError(
            f"{name}: expected integers of shape (B, T), "
            f"received {tensor.dtype} of shape {tuple(tensor.shape)}"
        )
    return tensor.long()


def as_tensor(name: str, values: Any, device: torch.device) -> Tensor:
    """Numbers as a tensor on the device."""
    try:
        return torch.as_tensor(values, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{name}: expected numbers in a regular shape: {reason}") from None


def check_range(name: str, values: Tensor, low: int, high: int, why: str) -> None:
    """Refuses values outside low..high, where they can be looked at."""
    if not is_known(values) or values.numel() == 0:
        return
    least, most = (int(x) for x in values.aminmax())
    if least < low or most > high:
        raise InputError(
            f"{name}: expected values in {low}..{high} ({why}), received {least}..{most}"
        )


def is_known(tensor: Tensor) -> bool:
    """Whether values can be read now: not while tracing or capturing, nor on the meta device."""
    if torch.compiler.is_compiling() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())
