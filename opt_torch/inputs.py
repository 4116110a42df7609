"""Model inputs: made into tensors and checked before anything is computed."""

from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from opt_core import inputs as rules
from opt_core.config import OPTConfig
from opt_core.generation.request import Ids, Mask
from opt_core.inputs import Range
from opt_torch import _private, distribution
from opt_torch.cache import KVCache


def check_inputs(
    config: OPTConfig,
    device: torch.device,
    dtype: torch.dtype,
    heads: int,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    cache: KVCache | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, KVCache | None]:
    """Turns arrays and lists into tensors on the model's device and checks shapes and ranges.

    Args:
        config: The model's configuration.
        device: Where the model is.
        dtype: Type of its weights.
        heads: Heads that this process computes.
        input_ids: (B, T) ids, or None.
        attention_mask: (B, T) or (B, past + T), or None.
        position_ids: (B, T), or None.
        inputs_embeds: (B, T, P), or None.
        cache: What came before, or None.

    Returns:
        The four inputs as tensors or None, the mask as bool, and the cache with room for them.

    Raises:
        InputError: What does not fit, expected and received.
    """
    ids = as_integers("input_ids", input_ids, device)
    mask = as_integers("attention_mask", attention_mask, device)
    positions = as_integers("position_ids", position_ids, device)
    embeds = None
    if inputs_embeds is not None:
        embeds = as_tensor("inputs_embeds", inputs_embeds, device).to(dtype)
    given = ids, mask, positions, embeds
    B, T = rules.check_inputs(config, *given, cache, check_ranges)
    if cache is not None:
        check_cache(config, dtype, heads, cache, B, T)
        cache = cache.with_room(T)
    return ids, None if mask is None else mask.bool(), positions, embeds, cache


def check_prompts(model: Any, input_ids: Any, attention_mask: Any) -> tuple[Ids, Mask | None]:
    """Checks prompts, (B, T); the ids and their mask, or None, in NumPy."""
    ids, mask, *_ = model._check_inputs(input_ids, attention_mask, None, None, None)
    assert ids is not None
    return ids.int().cpu().numpy(), None if mask is None else mask.cpu().numpy()


def check_cache(
    config: OPTConfig,
    dtype: torch.dtype,
    heads: int,
    cache: KVCache,
    rows: int | None,
    count: int | None,
) -> None:
    """Refuses a cache that another model made, that was continued already, or that is too small.

    Args:
        config: The model's configuration.
        dtype: Type of its weights.
        heads: Heads that this process computes.
        cache: The cache.
        rows: Rows B of the input.
        count: New tokens T.
    """
    place = cache.keys[0].device.type if cache.keys else ""
    if cache.grows and place and torch.is_autocast_enabled(place):
        dtype = torch.get_autocast_dtype(place)  # it was made of what the layers computed
    rules.check_cache(
        config, _name(dtype), cache, lambda keys: _name(keys.dtype), rows, count, heads
    )
    cache.check_intact(count or 0)


def check_prefix(model: Any, cache: Any, ids_BT: Ids, mask_BT: Mask | None) -> None:
    """Refuses a cache that cannot hold the beginning of some prompts.

    Args:
        model: The language model.
        cache: What the caller passed as `past_key_values`.
        ids_BT: The whole prompts.
        mask_BT: bool, False at padding; None if nothing is padded.
    """
    rules.check_is_cache(cache, KVCache)
    heads = distribution.local_heads(model, model.mesh)
    check_cache(model.config, model.dtype, heads, cache, cache.keys[0].shape[0], 0)
    seen = cache.mask
    rules.check_prefix(cache, None if seen is None else seen.cpu().numpy(), ids_BT, mask_BT)


def full_mask(mask_BT: Tensor | None, count: int, cache: KVCache | None) -> Tensor | None:
    """The mask over everything: what the cache remembers and the new tokens.

    Args:
        mask_BT: bool mask of the new tokens, of the past ones too, or of all slots of the cache;
            None: they are all real.
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
    if cache is not None:
        mask_BT = mask_BT[:, : past + count]
    # A mask of ones would only keep the fast causal kernels from running.
    return None if is_known(mask_BT) and bool(mask_BT.all()) else mask_BT


def check_window(config: OPTConfig, mask_BS: Tensor | None, length: int) -> None:
    """Refuses a sequence that has more tokens than the model has positions.

    Args:
        config: The model's configuration.
        mask_BS: bool, False at padding; None if there is none.
        length: Tokens S in all, padding included.
    """
    if length > config.max_position_embeddings and (mask_BS is None or is_known(mask_BS)):
        longest = length if mask_BS is None else int(mask_BS.sum(1).max())
        rules.check_window(config, longest)


def as_integers(name: str, values: Any, device: torch.device) -> Tensor | None:
    """A 2-D integer tensor on the device, or None; floats must be whole numbers."""
    if values is None:
        return None
    tensor = as_tensor(name, rules.as_row(name, values), device)
    is_integer = not tensor.is_complex()
    if tensor.is_floating_point() and is_known(tensor):
        is_integer = bool((tensor == tensor.round()).all())
    rules.check_kind(name, is_integer, tensor.dtype, tensor.shape)
    return tensor.long()


def as_tensor(name: str, values: Any, device: torch.device) -> Tensor:
    """Numbers as a tensor on the device."""
    try:
        return torch.as_tensor(rules.as_array(values), device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise rules.not_regular(name, error) from None


def check_ranges(ranges: Sequence[Range]) -> None:
    """Refuses values outside of ranges, where they can be looked at; it waits once for a device."""
    known = [r for r in ranges if is_known(r.values) and r.values.numel()]
    if known:
        extremes = torch.stack([torch.stack(r.values.long().aminmax()) for r in known])
        for expected, (least, most) in zip(known, extremes.tolist(), strict=True):
            rules.check_range(expected, least, most)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def is_known(value: Any) -> bool:
    """Whether values can be read now: not while tracing, transforming or on the meta device."""
    if not isinstance(value, Tensor):
        return True
    if torch.compiler.is_compiling() or _private.is_jit_tracing() or value.is_meta:
        return False
    if _private.in_transform():
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def to_tensor(model: Any, values: Any) -> Tensor:
    """NumPy's values on the model's device, ids as int64."""
    tensor = torch.as_tensor(values, device=model.device)
    return tensor.long() if tensor.dtype == torch.int32 else tensor


def to_array(values: Tensor) -> NDArray[Any]:
    """NumPy's values."""
    return values.detach().cpu().numpy()
