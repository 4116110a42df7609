"""Generation: one prefill, then one decode step per token.

`generate` drains what `stream` yields.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.text.detokenizer import StopStringTracker
from opt_core.text.tokenizer import OPTTokenizer
from opt_torch import sampling
from opt_torch.cache import KVCache
from opt_torch.fast_decode import make_step
from opt_torch.inputs import check_inputs, check_prefix, full_mask
from opt_torch.linear import packed
from opt_torch.prefill import prefill, prefill_prompts

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
        past: A cache that holds the beginning of the prompts, or None.
    """

    ids: Tensor
    mask: Tensor | None
    settings: GenerationConfig
    new_tokens: int
    vocabulary: int
    pad: int
    past: KVCache | None = None


def prepare(
    model: "OPTForCausalLM",
    input_ids: Any,
    attention_mask: Any,
    generation_config: GenerationConfig | None,
    seed: int,
    tokenizer: OPTTokenizer | None,
    past_key_values: KVCache | None = None,
    **overrides: Any,
) -> Request:
    """Checks prompts and settings against the model, before anything is computed.

    Raises:
        GenerationError: Padding on the right, a row without tokens, or a setting that cannot
            be honoured.
        InputError: Ids outside the vocabulary, or shapes that do not fit.
    """
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise GenerationError(f"seed: expected an integer in 0..2**63 - 1, received {seed!r}")
    config = model.config
    settings = model_settings(model, generation_config).replace(**overrides)
    ids, mask, _, _ = check_inputs(
        config, model.device, model.dtype, input_ids, attention_mask, None, None, None
    )
    assert ids is not None
    pads = [i for i in (settings.pad_token_id, config.pad_token_id) if i is not None]
    texts = {config.bos_token_id, config.eos_token_id, *settings.eos_ids}
    if mask is None and pads and pads[0] not in texts:
        # As transformers: an id that is nothing but padding is padding. Not so a BOS or EOS.
        mask = ids != pads[0]
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
    pad = [*pads, *settings.eos_ids, 0][0]
    if past_key_values is not None:
        check_prefix(config, model.dtype, past_key_values, ids, mask)
    new_tokens = settings.new_tokens(ids.shape[1])
    return Request(ids, mask, settings, new_tokens, vocabulary, pad, past_key_values)


def model_settings(model: "OPTForCausalLM", config: GenerationConfig | None) -> GenerationConfig:
    """The caller's settings, special ids they leave open taken from the model's; or the model's."""
    if config is None:
        return model.generation_config
    if not isinstance(config, GenerationConfig):
        raise GenerationError(
            f"generation_config: expected a GenerationConfig, received {type(config).__name__}"
        )
    ids = ("eos_token_id", "pad_token_id", "bos_token_id")
    open_ids = {n: getattr(model.generation_config, n) for n in ids if getattr(config, n) is None}
    return config.replace(**open_ids)


def decode_step(model: "OPTForCausalLM", ids_B: Tensor, cache: KVCache) -> tuple[Tensor, KVCache]:
    """Reads one more token per row.

    Returns:
        Logits (B, V) after it, and the cache that holds it.
    """
    return prefill(model, ids_B[:, None], cache.mask, cache)


@torch.no_grad()
def stream(
    model: "OPTForCausalLM", request: Request, seed: int, tokenizer: OPTTokenizer | None
) -> Iterator[Tensor]:
    """Chooses, yields and decodes until every row has ended.

    Args:
        model: The language model.
        request: What to generate, checked; not by beam search, which is certain of no token
            before the end.
        seed: Seed of sampling, 0 to 2**63 - 1.
        tokenizer: For stop strings.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended.
    """
    settings, copies = request.settings, request.settings.num_return_sequences
    (B, prompt), device = request.ids.shape, model.device
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.arange(B, device=device).repeat_interleave(copies)
    history, real = allocate_tokens(request, rows)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    eos = torch.tensor(settings.eos_ids, dtype=torch.long, device=device)
    stops = settings.stops if tokenizer is not None else ()
    trackers = [StopStringTracker(tokenizer, stops) for _ in rows] if tokenizer and stops else []
    with packed(model, request.new_tokens):
        logits, cache = prefill_prompts(model, request, rows, prompt + request.new_tokens - 1)
        step = make_step(model) or partial(decode_step, model)
        for made in range(request.new_tokens):
            end = prompt + made
            logits = mask_vocabulary(logits, request.vocabulary)
            logits = sampling.process_logits(
                logits, history[:, :end], real[:, :end], made, settings
            )
            if made == 0:
                check_logits(logits)
            token = torch.where(
                ended, request.pad, sampling.select_tokens(logits, settings, generator)
            )
            history[:, end] = token
            ended = ended | torch.isin(token, eos)
            if trackers:
                hits = [t.push(i) for t, i in zip(trackers, token.tolist(), strict=True)]
                ended = ended | torch.tensor(hits, device=device)
            yield token
            if made + 1 == request.new_tokens or ((len(eos) or trackers) and bool(ended.all())):
                return
            logits, cache = step(token, cache)


def allocate_tokens(request: Request, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The prompts of some rows with room for new tokens behind them, and where tokens are real."""
    ids = request.ids[rows]
    mask = torch.ones_like(ids).bool() if request.mask is None else request.mask[rows]
    free = ids.new_full((len(ids), request.new_tokens), request.pad)
    return torch.cat([ids, free], 1), torch.cat([mask, torch.ones_like(free).bool()], 1)


def check_logits(logits_BV: Tensor) -> None:
    """Refuses rows in which no token can come: all are banned, or the model gave NaN."""
    best = logits_BV.amax(-1)
    for row in (~torch.isfinite(best)).nonzero()[:1, 0].tolist():
        reason = "the logits are NaN" if bool(best[row].isnan()) else "every token is banned"
        raise GenerationError(f"row {row}: no token can be generated: {reason}")


def generate(
    model: "OPTForCausalLM", request: Request, seed: int, tokenizer: OPTTokenizer | None
) -> Tensor:
    """The prompts and all that `stream` yields after them."""
    new = list(stream(model, request, seed, tokenizer))
    prompts = request.ids.repeat_interleave(request.settings.num_return_sequences, 0)
    return torch.cat([prompts, torch.stack(new, 1)], 1)


def mask_vocabulary(logits_BV: Tensor, vocabulary: int) -> Tensor:
    """Logits in float32, ids from `vocabulary` on banned."""
    logits_BV = logits_BV.float()
    if vocabulary < logits_BV.shape[1]:
        logits_BV[:, vocabulary:] = sampling.BANNED
    return logits_BV
