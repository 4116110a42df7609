"""Reading prompts: all at once, in chunks, or behind what a cache holds of them already."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt_core.generation.request import Ids, Mask, Request
from opt_torch.cache import KVCache
from opt_torch.inputs import full_mask, to_tensor

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


def prefill_prompts(
    model: "OPTForCausalLM", prompts: Request, chunk: int | None, slots: int
) -> tuple[Tensor, KVCache]:
    """Reads the prompts of a request, without what its cache has of them already.

    Args:
        model: The language model.
        prompts: What to generate.
        chunk: Tokens to read at a time; None: all at once.
        slots: Slots S of the cache.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    B, past, device = len(prompts.ids), prompts.past, model.device
    cache = model.init_cache(B, slots) if past is None else past.resize(B, slots)
    ids = torch.as_tensor(prompts.ids[:, cache.length :], device=device).long()
    mask = None if prompts.mask is None else torch.as_tensor(prompts.mask, device=device)
    return prefill(model, ids, mask, cache, chunk)


def read_prompts(
    model: "OPTForCausalLM", request: Request, slots: int, copies: int
) -> tuple[Tensor, KVCache]:
    """Reads the prompts of a request, and makes several rows of each.

    Args:
        model: The language model.
        request: What to generate.
        slots: Slots S of the cache.
        copies: Rows of each prompt; there are R of them in all.

    Returns:
        Logits (R, V) after the last token, and the cache that holds the prompts.
    """
    found = prefill_prompts(model, request, request.settings.prefill_chunk_size, slots)
    return copy_rows(*found, copies)


def copy_rows(logits_BV: Tensor, cache: KVCache, copies: int) -> tuple[Tensor, KVCache]:
    """Several rows of each prompt: logits (B * copies, V), and the cache that goes with them."""
    if copies == 1:
        return logits_BV, cache
    rows = torch.arange(len(logits_BV), device=logits_BV.device).repeat_interleave(copies)
    return logits_BV[rows], cache.select(rows)


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


@torch.no_grad()
def observe(
    model: "OPTForCausalLM", ids_RT: Ids | None, embeds_BTP: Tensor | None, copies: int,
    mask_RT: Mask | None, cache: KVCache | None, slots: int,
    output_attentions: bool, output_hidden_states: bool,
) -> tuple[Tensor, KVCache, Any, Any]:  # fmt: skip
    """Reads tokens, for `opt_core.generation.observed`.

    Args:
        model: The language model.
        ids_RT: Token ids; None: embeddings are given.
        embeds_BTP: Embeddings in their place, of one row in `copies`.
        copies: Rows of each row of embeddings.
        mask_RT: bool, False at padding, for the first tokens; None: nothing is padded.
        cache: What was read before; None: nothing.
        slots: Slots of the cache that is then made.
        output_attentions: Whether attention weights are wanted.
        output_hidden_states: Whether hidden states are wanted.

    Returns:
        Logits (R, V) after them, the cache that holds them, attention weights and hidden states.
    """
    decoder = model.get_decoder()
    if embeds_BTP is None:
        embeds = decoder.embed_tokens(to_tensor(model, ids_RT))
    else:
        embeds = embeds_BTP.repeat_interleave(copies, 0)
    if cache is None:
        mask = None if mask_RT is None else to_tensor(model, mask_RT)
        cache = model.init_cache(len(embeds), slots)
    else:
        mask = full_mask(None, 1, cache)
    out = decoder(embeds, None, mask, cache, output_hidden_states, output_attentions)
    logits = model.compute_logits(out.last_hidden_state[:, -1])
    return logits, out.past_key_values, out.attentions, out.hidden_states
