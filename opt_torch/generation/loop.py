"""Generation: one prefill, then one decode step per token.

`generate` drains what `stream` yields.
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opt_core.generation import filters
from opt_core.generation.request import Request, allocate_tokens, check_logits
from opt_torch.cache import KVCache
from opt_torch.generation import sampling
from opt_torch.generation.fast_decode import make_step
from opt_torch.generation.prefill import prefill, read_prompts
from opt_torch.linear import packed

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


def decode_step(model: "OPTForCausalLM", ids_B: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """Reads one more token per row.

    Returns:
        Logits (B, V) after it, and the cache that holds it.
    """
    return prefill(model, ids_B[:, None], cache.mask, cache)


_PATIENCE = 16
"""Tokens after which a device is waited for, to see whether all rows have ended."""


def stream(model: "OPTForCausalLM", request: Request) -> Iterator[Tensor]:
    """Chooses, yields and decodes until every row has ended.

    Args:
        model: The language model.
        request: What to generate; not by beam search, which is certain of no token before the
            end.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended.
    """
    yield from _tokens(model, request, 1)


@torch.no_grad()
def _tokens(model: "OPTForCausalLM", request: Request, patience: int) -> Iterator[Tensor]:
    """The tokens of `stream`, and up to `patience - 1` columns of padding."""
    settings, copies, device = request.settings, request.settings.num_return_sequences, model.device
    prompt, new = request.ids.shape[1], request.new_tokens
    generator = sampling.random_source(model, request.seed)(0)
    history, mask = (
        torch.as_tensor(x, device=device) for x in allocate_tokens(request, prompt + new, copies)
    )
    history = history.long()
    ended = torch.zeros(len(history), dtype=torch.bool, device=device)
    rules = sampling.request_rules(model, request)
    trackers = request.stop_trackers(len(history))
    with packed(model, new):
        logits, cache = read_prompts(model, request, prompt + new - 1, copies)
        step = make_step(model) or partial(decode_step, model)
        for made in range(new):
            end = prompt + made
            logits = mask_vocabulary(logits, rules.vocabulary)
            logits = filters.process_logits(
                *(sampling, logits, history[:, :end], mask[:, :end], end, made, rules),
                is_last=made + 1 == new,
            )
            if made == 0:
                check_logits(logits.amax(-1).cpu().numpy())
            token = torch.where(
                ended, request.pad, filters.select_tokens(sampling, logits, rules, generator)
            )
            history[:, end] = token
            ended = ended | rules.ends[token]
            if trackers:
                hits = [t.push(i) for t, i in zip(trackers, token.tolist(), strict=True)]
                ended = ended | torch.tensor(hits, device=device)
            yield token
            is_time = (settings.eos_ids or trackers) and (made + 1) % patience == 0
            if made + 1 == new or (is_time and bool(ended.all())):
                return
            logits, cache = step(token, cache)


def generate(model: "OPTForCausalLM", request: Request) -> Tensor:
    """The prompts and all that `stream` yields after them."""
    prompts = torch.as_tensor(request.ids, device=model.device).long()
    prompts = prompts.repeat_interleave(request.settings.num_return_sequences, 0)
    # Strings are looked for on the host: it waits for each token anyway.
    may_wait = model.device.type == "cpu" or bool(request.settings.stops)
    tokens = torch.stack(list(_tokens(model, request, 1 if may_wait else _PATIENCE)), 1)
    if not may_wait and request.settings.eos_ids:
        tokens = tokens[:, : _longest(tokens, request.settings.eos_ids)]
    return torch.cat([prompts, tokens], 1)


def _longest(tokens_RT: Tensor, eos_ids: Collection[int]) -> int:
    """Tokens of the row that ends last, its end included."""
    ended = torch.isin(tokens_RT, torch.tensor([*eos_ids], device=tokens_RT.device))
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, tokens_RT.shape[1])
    return int(lengths.max())


def mask_vocabulary(logits_BV: Tensor, vocabulary: int) -> Tensor:
    """Logits in float32, ids from `vocabulary` on banned."""
    logits_BV = logits_BV.float()
    if vocabulary < logits_BV.shape[1]:
        logits_BV[:, vocabulary:] = sampling.BANNED
    return logits_BV
