"""Reading prompts: all at once, in chunks, or behind what a cache holds of them already."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opt_core.generation.request import Request
from opt_torch.cache import KVCache

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


def prefill_prompts(
    model: "OPTForCausalLM", prompts: Request, chunk: int | None, slots: int, copies: int
) -> tuple[Tensor, KVCache]:
    """Reads the prompts of a request, without what its cache has of them already.

    Args:
        model: The language model.
        prompts: What to generate.
        chunk: Tokens to read at a time; None: all at once.
        slots: Slots S of the cache.
        copies: Rows that each prompt gets; there are R of them in all.

    Returns:
        Logits (R, V) after the last token, and the cache that holds the prompts.
    """
    B, past, device = len(prompts.ids), prompts.past, model.device
    cache = model.init_cache(B, slots) if past is None else past.resize(B, slots)
    ids = torch.as_tensor(prompts.ids[:, cache.length :], device=device).long()
    mask = None if prompts.mask is None else torch.as_tensor(prompts.mask, device=device)
    logits, cache = prefill(model, ids, mask, cache, chunk)
    if copies > 1:
        rows = torch.arange(B, device=device).repeat_interleave(copies)
        logits, cache = logits[rows], cache.select(rows)
    return logits, cache


def prefill(
    model: "OPTForCausalLM",
    ids_BT: Tensor,
    mask_BS: Tensor | None,
    cache: KVCache,
    chunk: int | None = None,
) -> tuple[Tensor, KVCache]:
    """Reads the prompts.

    Args:
        model: The language model.
        ids_BT: Prompts, or what follows the tokens in the cache.
        mask_BS: bool, False at padding, for all of these; None if nothing is padded.
        cache: What came before.
        chunk: Tokens to read at a time; None: all at once.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    decoder, hidden = model.get_decoder(), None
    for ids in ids_BT.split(chunk or ids_BT.shape[1], 1):
        mask = None if mask_BS is None else mask_BS[:, : cache.filled(ids.shape[1])]
        out = decoder(decoder.embed_tokens(ids), None, mask, cache)
        hidden, cache = out.last_hidden_state, out.past_key_values
    assert hidden is not None
    return model.compute_logits(hidden[:, -1]), cache
