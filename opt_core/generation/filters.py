"""The filters of logits in `transformers`' order; a backend's `sampling` module has each of them.

In a compiled program the numbers among the settings are tensors: other values need no other
program, and a filter whose number is one is always in use.
"""

from typing import Any


def process_logits(
    sampling: Any,
    logits_BV: Any,
    ids_BS: Any,
    mask_BS: Any,
    end: Any,
    made: Any,
    settings: Any,
) -> Any:
    """Applies what holds for greedy search, sampling and beams alike.

    Args:
        sampling: The backend's module of that name.
        logits_BV: float32 logits, or log-probabilities in beam search.
        ids_BS: Prompt and generated tokens.
        mask_BS: bool, False at padding and from `end` on.
        end: Slots in use.
        made: How many of the tokens were generated, of each row where they differ; the number 0
            for the first of them.
        settings: What to apply: a `GenerationConfig`, or a program's `ProgramSettings`.
    """
    if is_in_use(settings.repetition_penalty, 1):
        penalty = settings.repetition_penalty
        logits_BV = sampling.repetition_penalty(logits_BV, ids_BS, mask_BS, penalty)
    if settings.no_repeat_ngram_size:
        size = settings.no_repeat_ngram_size
        logits_BV = sampling.no_repeat_ngram(logits_BV, ids_BS, mask_BS, end, size)
    for word in settings.bad_words_ids or ():
        if word not in {(i,) for i in settings.eos_ids}:
            logits_BV = sampling.ban_word(logits_BV, ids_BS, mask_BS, end, word)
    if is_in_use(settings.min_length, 0) or is_in_use(settings.min_new_tokens, None, 0):
        fewest = 0 if settings.min_new_tokens is None else settings.min_new_tokens
        logits_BV = sampling.ban_end(
            logits_BV, mask_BS, settings.min_length, made < fewest, settings.eos_ids
        )
    if settings.suppress_tokens:
        logits_BV = sampling.ban_tokens(logits_BV, settings.suppress_tokens)
    if settings.begin_suppress_tokens and isinstance(made, int) and made == 0:
        logits_BV = sampling.ban_tokens(logits_BV, settings.begin_suppress_tokens)
    return logits_BV


def candidates(sampling: Any, logits_BV: Any, settings: Any) -> tuple[Any, Any]:
    """The tokens to draw among.

    Args:
        sampling: The backend's module of that name.
        logits_BV: float32 logits.
        settings: temperature, top_k, top_p, min_p and typical_p, applied in this order.

    Returns:
        Their logits, likeliest first and -inf for what the filters left out, and their ids,
        (B, C) each.
    """
    V = logits_BV.shape[-1]
    k = min(settings.top_k or V, V)
    logits_BC, ids_BC = sampling.top_k(logits_BV / settings.temperature, k)
    if is_in_use(settings.top_p, 1):
        logits_BC = sampling.top_p(logits_BC, settings.top_p)
    if is_in_use(settings.min_p, None):
        logits_BC = sampling.min_p(logits_BC, settings.min_p)
    if is_in_use(settings.typical_p, 1):
        logits_BC = sampling.typical_p(logits_BC, settings.typical_p)
    return logits_BC, ids_BC


def select_tokens(sampling: Any, logits_BV: Any, settings: Any, source: Any) -> Any:
    """The next token of each row, (B,): the likeliest, or drawn where `do_sample` is set.

    Args:
        sampling: The backend's module of that name.
        logits_BV: float32 logits.
        settings: What to apply.
        source: Of random numbers, as the backend's `draw_tokens` takes it.
    """
    if not settings.do_sample:
        return sampling.likeliest_tokens(logits_BV)
    return sampling.draw_tokens(*candidates(sampling, logits_BV, settings), source)


def is_in_use(value: Any, *neutral: Any) -> bool:
    """Whether a filter has to be applied: its number is a tensor, or not one that is neutral."""
    return not isinstance(value, int | float | None) or value not in neutral
