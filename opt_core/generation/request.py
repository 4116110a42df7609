"""Requests for generation: prompts and settings, checked before anything is computed.

Compiled backends make few programs: lengths are rounded up to a bucket.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.compatibility.notices import notice
from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig, as_ids
from opt_core.generation.hooks import NO_HOOKS, Hooks
from opt_core.text.adapter import as_tokenizer
from opt_core.text.detokenizer import StopStringTracker
from opt_core.text.tokenizer import OPTTokenizer

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]

_BUCKETS = (32, 64, 128, 256)


@dataclass(frozen=True)
class Request:
    """A checked request for generation.

    Attributes:
        ids: (B, T) prompts.
        mask: bool (B, T), False at padding; None if nothing is padded.
        settings: What to generate.
        new_tokens: Most tokens to add.
        vocab_size: Ids V of the model.
        vocabulary: Ids below this one may be generated.
        pad: Id that fills a finished row.
        seed: Seed of sampling, 0 to 2**63 - 1.
        tokenizer: For stop strings.
        past: A backend's cache that holds the beginning of the prompts, or None.
        assistant: A backend's smaller model that drafts tokens, or None.
        hooks: Functions of the caller that run between the steps.
        embeds: (B, T, P) embeddings of the prompts in place of those of `ids`, or None.
        is_bare: Whether there are embeddings alone: `ids` are padding then.
        guide: The prompts to go away from, or None.
        calls_model: Whether the model itself is called for each token (`own_calls`).
    """

    ids: Ids
    mask: Mask | None
    settings: GenerationConfig
    new_tokens: int
    vocab_size: int
    vocabulary: int
    pad: int
    seed: int = 0
    tokenizer: OPTTokenizer | None = None
    past: Any = None
    assistant: Any = None
    hooks: Hooks = NO_HOOKS
    embeds: Any = None
    is_bare: bool = False
    guide: "Request | None" = None
    calls_model: bool = False

    @property
    def is_observed(self) -> bool:
        """Whether Python has to run between the steps."""
        settings = self.settings
        outputs = (
            settings.output_scores or settings.output_logits or settings.output_attentions
            or settings.output_hidden_states or settings.return_legacy_cache
        )  # fmt: skip
        has_hard_beams = settings.is_beam_search and (
            settings.do_sample or settings.num_beam_groups > 1 or settings.stops
            or settings.max_time is not None
        )  # fmt: skip
        return bool(
            self.calls_model or (outputs and settings.return_dict_in_generate) or has_hard_beams
            or not self.hooks.is_empty or self.embeds is not None or self.guide is not None
        )  # fmt: skip

    @property
    def slots(self) -> int:
        """Slots S that a compiled program has for prompts and new tokens."""
        # No fewer than the second bucket: empty slots cost less than one more program.
        return max(bucket(self.ids.shape[1] + self.new_tokens), _BUCKETS[1])

    @property
    def chunk(self) -> int | None:
        """Prompt tokens that a compiled program reads at a time; None: all, nothing before them."""
        T, chunk = self.ids.shape[1], self.settings.prefill_chunk_size
        if self.past is None:
            return None if chunk is None or chunk >= T else chunk
        return min(chunk or T, bucket(T - int(self.past.length)))

    def full_mask(self) -> Mask:
        """Bool (B, T), False at padding, also where nothing is padded."""
        return np.ones(self.ids.shape, bool) if self.mask is None else self.mask

    def stop_trackers(self, rows: int) -> list[StopStringTracker]:
        """A tracker of the stop strings for each row; none where there are no such strings."""
        tokenizer, stops = self.tokenizer, self.settings.stops
        if tokenizer is None or not stops:
            return []
        return [StopStringTracker(tokenizer, stops) for _ in range(rows)]

    def join(self, columns: Iterable[Any]) -> Ids:
        """The prompts, each `num_return_sequences` times, and columns (R,) of ids behind them."""
        prompts = self.ids.repeat(self.settings.num_return_sequences, 0)
        return np.concatenate([prompts, np.stack([np.asarray(c) for c in columns], 1)], 1)


def check_request(
    config: OPTConfig,
    defaults: GenerationConfig,
    input_ids: Ids,
    attention_mask: Mask | None,
    generation_config: GenerationConfig | None,
    seed: int,
    tokenizer: OPTTokenizer | None,
    **overrides: Any,
) -> Request:
    """Checks prompts and settings against a model.

    Args:
        config: The model's configuration.
        defaults: The model's settings.
        input_ids: (B, T) prompts, ids of the vocabulary.
        attention_mask: bool (B, T), False at padding; None: ids that are nothing but padding are.
        generation_config: The caller's settings; None: the model's.
        seed: Seed of sampling, 0 to 2**63 - 1.
        tokenizer: For stop strings; where given, ids it does not know are never generated.
        **overrides: Fields of `GenerationConfig`.

    Raises:
        GenerationError: Padding on the right, a row without tokens, or a setting that cannot
            be honoured.
    """
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise GenerationError(f"seed: expected an integer in 0..2**63 - 1, received {seed!r}")
    tokenizer = None if tokenizer is None else as_tokenizer(tokenizer)
    settings = merge_settings(defaults, generation_config, **overrides)
    longest = T = input_ids.shape[1]
    pads, mask = _padding_ids(config, settings), attention_mask
    only_padding = padding_id(config, settings)
    if mask is None and only_padding is not None:
        mask = input_ids != only_padding
    mask = None if mask is None or mask.all() else mask
    if mask is not None:
        longest = int(mask.sum(1).max())
        for row in np.flatnonzero(~mask[:, -1])[:1].tolist():
            raise GenerationError(
                f"prompt {row} ends in padding; "
                "pad on the left: tokenizer(..., padding_side='left')"
            )
    if settings.max_new_tokens is None and settings.max_length is None:
        room = max(config.max_position_embeddings - longest + 1, 1)
        settings = settings.replace(max_new_tokens=min(DEFAULT_NEW_TOKENS, room))
        notice(
            f"no length was asked for: {settings.max_new_tokens} new tokens at most; "
            "pass max_new_tokens for another number"
        )
    settings.check(config, T, longest, tokenizer is not None)
    vocabulary, pad = config.vocab_size, [*pads, *settings.eos_ids, 0][0]
    if tokenizer is not None:
        # OPT's embedding has rows that no token has, never trained (transformers #18268).
        vocabulary = min(vocabulary, tokenizer.id_limit)
    new = settings.new_tokens(T)
    size = config.vocab_size
    return Request(input_ids, mask, settings, new, size, vocabulary, pad, seed, tokenizer)


def check_export(
    config: OPTConfig,
    defaults: GenerationConfig,
    max_prompt: int,
    generation_config: GenerationConfig | None,
    tokenizer: OPTTokenizer | None,
    **overrides: Any,
) -> Request:
    """The request that an exported program answers, its prompt of the greatest length.

    Raises:
        GenerationError: A setting that cannot be honoured, or that cannot be exported.
    """
    settings = merge_settings(defaults, generation_config, **overrides)
    if settings.max_new_tokens is None:
        raise GenerationError("max_new_tokens: an export needs it, received None")
    if settings.stops:
        raise GenerationError("stop_strings cannot be exported; use eos_token_id")
    ids, mask = np.zeros((1, max_prompt), np.int32), np.ones((1, max_prompt), bool)
    return check_request(config, settings, ids, mask, None, 0, tokenizer)


def merge_settings(
    defaults: GenerationConfig, settings: GenerationConfig | None, **overrides: Any
) -> GenerationConfig:
    """The caller's settings, special ids they leave open taken from the model's; or the model's.

    Raises:
        GenerationError: These are no settings, or an override is none or of a bad value.
    """
    defaults = GenerationConfig.from_any(defaults)
    if settings is None:
        return defaults.replace(**overrides)
    given = GenerationConfig.from_any(settings)
    ids = ("eos_token_id", "pad_token_id", "bos_token_id")
    open_ids = {name: getattr(defaults, name) for name in ids if getattr(given, name) is None}
    return given.replace(**open_ids).replace(**overrides)


def padding_id(config: OPTConfig, settings: GenerationConfig) -> int | None:
    """The id that is padding wherever it comes, as in `transformers`: not so a BOS or EOS."""
    pads = _padding_ids(config, settings)
    texts = {config.bos_token_id, *settings.eos_ids, *as_ids(config.eos_token_id)}
    return pads[0] if pads and pads[0] not in texts else None


def _padding_ids(config: OPTConfig, settings: GenerationConfig) -> list[int]:
    """Ids that mean padding, the settings' first."""
    return [i for i in (settings.pad_token_id, config.pad_token_id) if i is not None and i >= 0]


def bucket(length: int) -> int:
    """The length that something so long is padded to: 32, 64, 128, 256, 512, 768, ..."""
    step = _BUCKETS[-1]
    return next((b for b in _BUCKETS if b >= length), -(-length // step) * step)


def pad_right(values_BT: NDArray[Any], width: int, fill: Any) -> NDArray[Any]:
    """Rows filled up on the right to a width."""
    return np.pad(values_BT, ((0, 0), (0, width - values_BT.shape[1])), constant_values=fill)


def allocate_tokens(request: Request, slots: int, copies: int = 1) -> tuple[Ids, Mask]:
    """The prompts with slots for new tokens behind them, and where tokens are no padding.

    Args:
        request: What to generate.
        slots: Tokens S of a row, those of the prompt among them.
        copies: Rows that each prompt has.

    Returns:
        ids (B * copies, S), and bool (B * copies, S), True at free slots.
    """
    ids = pad_right(request.ids, slots, request.pad)
    return ids.repeat(copies, 0), pad_right(request.full_mask(), slots, True).repeat(copies, 0)


def check_logits(best_B: NDArray[Any]) -> None:
    """Refuses rows in which no token can come: all are banned, or the model gave NaN.

    Args:
        best_B: The largest logit of each row.
    """
    for row in np.flatnonzero(~np.isfinite(best_B))[:1].tolist():
        reason = "the logits are NaN" if np.isnan(best_B[row]) else "every token is banned"
        raise GenerationError(f"row {row}: no token can be generated: {reason}")


def pair_seed(first: Any, second: Any) -> Any:
    """One seed of two numbers, which TensorFlow's stateless functions and `transformers` take."""
    return first % 2**31 * 2**31 + second % 2**31
