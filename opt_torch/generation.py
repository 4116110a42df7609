"""Generation: one prefill, then one decode step per token.

`generate` drains what `stream` yields.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt_core.detokenizer import StopStringTracker
from opt_core.errors import GenerationError
from opt_core.generation import GenerationConfig
from opt_core.tokenizer import OPTTokenizer
from opt_torch import sampling
from opt_torch.cache import KVCache
from opt_torch.inputs import check_inputs, full_mask
from opt_torch.linear import pack

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM


@dataclass(frozen=True)
class Request:
    """A checked request for generation.

    Attributes:
        ids: (B, T) prompts.
        mask: bool (B, T), False at padding; None if nothing is padded.
        settings: What to generate.
        new_tokens: Most tokens to add.
        vocabulary: Ids below this one may be generated.
        pad: Id that fills a finished row.
    """

    ids: Tensor
    mask: Tensor | None
    settings: GenerationConfig
    new_tokens: int
    vocabulary: int
    pad: int


def prepare(
    model: "OPTForCausalLM",
    input_ids: Any,
    attention_mask: Any,
    generation_config: GenerationConfig | None,
    tokenizer: OPTTokenizer | None,
    **overrides: Any,
) -> Request:
    """Checks prompts and settings against the model, before anything is computed.

    Raises:
        GenerationError: Padding on the right, a row without tokens, or a setting that cannot
            be honoured.
        InputError: Ids outside the vocabulary, or shapes that do not fit.
    """
    config = model.config
    settings = (generation_config or model.generation_config).replace(**overrides)
    ids, mask, _, _ = check_inputs(
        config, model.device, input_ids, attention_mask, None, None, None
    )
    assert ids is not None
    mask = full_mask(mask, ids.shape[1], None)
    longest = ids.shape[1]
    if mask is not None:
        longest = int(mask.sum(1).max())
        for row in (~mask[:, -1]).nonzero()[:1, 0].tolist():
            raise GenerationError(
                f"prompt {row} ends in padding; "
                "pad on the left: tokenizer(..., padding_side='left')"
            )
    settings.check(config, ids.shape[1], longest, tokenizer is not None)
    vocabulary = config.vocab_size
    if tokenizer is not None:
        # OPT's embedding has rows that no token has, never trained (transformers #18268).
        vocabulary = min(vocabulary, tokenizer.vocab_size)
    pad = next(
        (
            i
            for i in (settings.pad_token_id, config.pad_token_id, *settings.eos_ids)
            if i is not None
        ),
        0,
    )
    return Request(ids.long(), mask, settings, settings.new_tokens(ids.shape[1]), vocabulary, pad)


def prefill(
    model: "OPTForCausalLM", ids_BT: Tensor, mask_BT: Tensor | None, cache: KVCache
) -> tuple[Tensor, KVCache]:
    """Reads the prompts.

    Returns:
        Logits (B, V) after the last token, and the cache that holds the prompts.
    """
    decoder = model.get_decoder()
    out = decoder(decoder.embed_tokens(ids_BT), None, mask_BT, cache)
    return model.lm_head(out.last_hidden_state[:, -1]), out.past_key_values


def decode_step(model: "OPTForCausalLM", ids_B: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """Reads one more token per row.

    Returns:
        Logits (B, V) after it, and the cache that holds it.
    """
    mask = None if cache.mask is None else cache.mask[:, : cache.length + 1]
    return prefill(model, ids_B[:, None], mask, cache)


@torch.inference_mode()
def stream(
    model: "OPTForCausalLM", request: Request, seed: int, tokenizer: OPTTokenizer | None
) -> Iterator[Tensor]:
    """Chooses, yields and decodes until every row has ended.

    Args:
        model: The language model.
        request: What to generate, checked; not by beam search, which is certain of no token
            before the end.
        seed: Seed of sampling.
        tokenizer: For stop strings.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended.
    """
    settings, copies = request.settings, request.settings.num_return_sequences
    B, prompt = request.ids.shape
    generator = torch.Generator(model.device).manual_seed(seed)
    pack(model, model.get_decoder().embed_tokens.weight)
    cache = model.init_cache(B, prompt + request.new_tokens - 1)
    logits, cache = prefill(model, request.ids, request.mask, cache)
    ids, mask = (
        request.ids,
        request.mask if request.mask is not None else torch.ones_like(request.ids).bool(),
    )
    if copies > 1:
        rows = torch.arange(B, device=model.device).repeat_interleave(copies)
        logits, ids, mask, cache = logits[rows], ids[rows], mask[rows], cache.select(rows)
    history = torch.cat([ids, ids.new_full((len(ids), request.new_tokens), request.pad)], 1)
    real = torch.cat([mask, mask.new_ones(len(ids), request.new_tokens)], 1)
    eos = torch.tensor(settings.eos_ids, dtype=torch.long, device=model.device)
    ended = torch.zeros(len(ids), dtype=torch.bool, device=model.device)
    trackers = (
        [StopStringTracker(tokenizer, settings.stops) for _ in ids]
        if tokenizer and settings.stops
        else []
    )
    for made in range(request.new_tokens):
        end = prompt + made
        logits = allowed(logits, request.vocabulary)
        logits = sampling.constrain(logits, history[:, :end], real[:, :end], made, settings)
        token = torch.where(ended, request.pad, sampling.choose(logits, settings, generator))
        history[:, end] = token
        ended = ended | torch.isin(token, eos)
        if trackers:
            hits = [t.push(i) for t, i in zip(trackers, token.tolist(), strict=True)]
            ended = ended | torch.tensor(hits, device=model.device)
        yield token
        if made + 1 == request.new_tokens or ((len(eos) or trackers) and bool(ended.all())):
            return
        logits, cache = decode_step(model, token, cache)


def generate(
    model: "OPTForCausalLM", request: Request, seed: int, tokenizer: OPTTokenizer | None
) -> Tensor:
    """The prompts and all that `stream` yields after them."""
    new = list(stream(model, request, seed, tokenizer))
    prompts = request.ids.repeat_interleave(request.settings.num_return_sequences, 0)
    return torch.cat([prompts, torch.stack(new, 1)], 1)


def allowed(logits_BV: Tensor, vocabulary: int) -> Tensor:
    """Logits in float32, ids from `vocabulary` on banned."""
    logits_BV = logits_BV.float()
    if vocabulary < logits_BV.shape[1]:
        logits_BV[:, vocabulary:] = sampling.BANNED
    return logits_BV
