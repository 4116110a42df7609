"""The filters of logits in `transformers`' order; a backend's `sampling` module has each of them.

They are given the `Rules` of a request: a filter whose number is not there is not in use.
"""

from typing import Any

_WARPERS = ("top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")


def process_logits(
    sampling: Any,
    logits_BV: Any,
    ids_BS: Any,
    mask_BS: Any,
    end: Any,
    made: Any,
    rules: Any,
    is_last: Any = False,
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
        rules: What to apply, a `Rules`.
        is_last: Whether no token comes after this one, of each row where they differ.
    """
    bias = rules.begin_bias if isinstance(made, int) and made == 0 else rules.bias
    if bias is not None:
        logits_BV = sampling.add_bias(logits_BV, bias)
    if rules.words is not None:
        matches = _match_words(sampling, ids_BS, mask_BS, end, rules.words)
        logits_BV = sampling.add_biases(logits_BV, rules.words[:, -1], matches, rules.word_bias)
    if rules.repetition_penalty is not None:
        penalty = rules.repetition_penalty
        logits_BV = sampling.repetition_penalty(logits_BV, ids_BS, mask_BS, penalty)
    if rules.no_repeat_ngram_size is not None:
        marks_BS = _mark_repeats(sampling, ids_BS, mask_BS, end, rules)
        logits_BV = sampling.ban_marked(logits_BV, ids_BS, marks_BS)
    if rules.min_length is not None:
        is_early = made < rules.min_new_tokens
        logits_BV = sampling.ban_end(logits_BV, mask_BS, rules.min_length, is_early, rules.ends)
    if rules.forced_end is not None:
        logits_BV = sampling.force_tokens(logits_BV, rules.forced_end, is_last)
    if rules.is_repaired is not None:
        logits_BV = sampling.repair(logits_BV)
    if rules.decay_start is not None:
        power = made - rules.decay_start
        logits_BV = sampling.favour_end(logits_BV, power, rules.decay_factor, rules.ends)
    return sampling.normalize(logits_BV) if rules.renormalize_logits else logits_BV


def candidates(sampling: Any, logits_BV: Any, rules: Any) -> tuple[Any, Any]:
    """The tokens to draw among.

    Args:
        sampling: The backend's module of that name.
        logits_BV: float32 logits.
        rules: What to apply: the temperature, then the filters of these names.

    Returns:
        Their logits, likeliest first and -inf for what the filters left out, and their ids,
        (B, C) each.
    """
    if rules.temperature is not None:
        logits_BV = logits_BV / rules.temperature
    logits_BC, ids_BC = sampling.sort_logits(logits_BV, rules.candidates)
    for name in _WARPERS:
        number = getattr(rules, name)
        if number is not None:
            logits_BC = getattr(sampling, name)(logits_BC, number, rules.fewest)
    return logits_BC, ids_BC


def select_tokens(sampling: Any, logits_BV: Any, rules: Any, source: Any) -> Any:
    """The next token of each row, (B,): the likeliest, or drawn where `do_sample` is set.

    Args:
        sampling: The backend's module of that name.
        logits_BV: float32 logits.
        rules: What to apply.
        source: Of random numbers, as the backend's `draw_tokens` takes it.
    """
    if not rules.do_sample:
        return sampling.likeliest_tokens(logits_BV)
    return sampling.draw_tokens(*candidates(sampling, logits_BV, rules), source)


def _match_words(sampling: Any, ids_BS: Any, mask_BS: Any, end: Any, words: Any) -> Any:
    """Bool (B, words): where the rows end in all ids of a word but its last."""
    length, matches = words.shape[1], True
    for back in range(1, length):
        last_B, is_real_B = sampling.token_before(ids_BS, mask_BS, end, back)
        wanted = words[:, length - 1 - back]
        is_equal = (last_B[:, None] == wanted) & is_real_B[:, None]
        matches &= is_equal | (wanted < 0)
    return matches


def _mark_repeats(sampling: Any, ids_BS: Any, mask_BS: Any, end: Any, rules: Any) -> Any:
    """Bool (B, S): the tokens that would complete an n-gram the row already has."""
    size = rules.no_repeat_ngram_size
    marks_BS = mask_BS & (size > 0)
    for back in range(1, rules.longest_ngram):
        last_B, is_real_B = sampling.token_before(ids_BS, mask_BS, end, back)
        is_equal_BS = sampling.shift(ids_BS, back) == last_B[:, None]
        is_equal_BS &= sampling.shift(mask_BS, back) & is_real_B[:, None]
        marks_BS &= is_equal_BS | (back >= size)
    return marks_BS
