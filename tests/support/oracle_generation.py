"""The independent reference for generation: filters, greedy search, beam search and brute force.

The rules are those of `transformers` 5, written again for one sequence at a time, except that
padding is never seen by a filter. Every step computes the whole sequence anew: nothing here has a
cache that could be wrong.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opt_core.config import OPTConfig
from tests.support.oracle import Array, Params, forward, log_softmax

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Settings:
    """The filters of the next token; names and meanings are those of `transformers`.

    Attributes:
        repetition_penalty: Divides the positive scores of tokens already there, multiplies the
            negative ones.
        no_repeat_ngram_size: No run of this many tokens may come twice; 0 is off.
        bad_words_ids: Runs of tokens that may not be completed.
        min_length: No end-of-text token before prompt and new tokens are this many.
        min_new_tokens: No end-of-text token before the new tokens are this many.
        suppress_tokens: Tokens that may never come.
        begin_suppress_tokens: Tokens that may not come first.
        eos_token_ids: The end-of-text tokens.
        sequence_bias: Runs of tokens, and what is added to the last one's score behind the others.
        forced_bos_token_id: The only token behind a prompt of one.
        forced_eos_token_id: The only token at the last place.
        exponential_decay_length_penalty: After how many new tokens, and by which factor, the end
            becomes likelier.
        max_new_tokens: For the last place.
        temperature: Divides the scores; sampling only, as all that follow.
        top_h: Of the 100 best tokens the first with this part of their entropy stay; None is off.
        top_k: How many of the best tokens stay (and any that tie with the last); 0 is off.
        top_p: The best tokens stay until they have this mass; 1 is off.
        min_p: Tokens below this fraction of the best one's probability go; None is off.
        typical_p: The tokens of most typical surprise stay until they have this mass; 1 is off.
        epsilon_cutoff: Tokens less probable than this go; 0 is off.
        eta_cutoff: Tokens less probable than this go, or than its root over e to the entropy.
    """

    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] = ()
    min_length: int = 0
    min_new_tokens: int = 0
    suppress_tokens: Sequence[int] = ()
    begin_suppress_tokens: Sequence[int] = ()
    eos_token_ids: Sequence[int] = ()
    sequence_bias: Sequence[tuple[Sequence[int], float]] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    max_new_tokens: int = 0
    temperature: float = 1.0
    top_h: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0


NO_FILTERS = Settings()


def constrain(
    scores: Array, history: Sequence[int], prompt_length: int, settings: Settings
) -> Array:
    """Applies the filters that every way of generating obeys.

    Args:
        scores: Logits, or in beam search log-probabilities, of the next token [V].
        history: The prompt without its padding, and what was generated.
        prompt_length: How many tokens of the history are the prompt's.
        settings: Which filters.
    """
    scores, history = np.array(scores, np.float64), tuple(int(token) for token in history)
    eos, made = list(settings.eos_token_ids), len(history) - prompt_length
    for word, bias in settings.sequence_bias:
        if _tail(history, len(word) - 1) == tuple(word[:-1]):
            scores[word[-1]] += bias
    for token in set(history):
        penalty = settings.repetition_penalty
        scores[token] *= penalty if scores[token] < 0 else 1 / penalty

    n = settings.no_repeat_ngram_size
    if n:
        runs = [history[i : i + n] for i in range(len(history) - n + 1)]
        _ban(scores, (run[-1] for run in runs if run[:-1] == _tail(history, n - 1)))

    for word in map(tuple, settings.bad_words_ids):
        ends_text = len(word) == 1 and word[0] in eos
        if not ends_text and _tail(history, len(word) - 1) == word[:-1]:
            _ban(scores, word[-1:])
    if len(history) < settings.min_length:
        _ban(scores, eos)
    if len(history) - prompt_length < settings.min_new_tokens:
        _ban(scores, eos)
    if settings.forced_bos_token_id is not None and len(history) == 1:
        scores = _only(scores, settings.forced_bos_token_id)
    if settings.forced_eos_token_id is not None and made == settings.max_new_tokens - 1:
        scores = _only(scores, settings.forced_eos_token_id)
    if settings.exponential_decay_length_penalty is not None:
        start, factor = settings.exponential_decay_length_penalty
        for token in eos:
            if made > start and np.isfinite(scores[token]):
                scores[token] += abs(scores[token]) * (factor ** (made - start) - 1)
    _ban(scores, settings.suppress_tokens)
    if len(history) == prompt_length:
        _ban(scores, settings.begin_suppress_tokens)
    return scores


def _ban(scores: Array, tokens: Iterable[int]) -> None:
    scores[list(tokens)] = -np.inf


def _only(scores: Array, token: int) -> Array:
    return np.where(np.arange(len(scores)) == token, 0, -np.inf)


def _tail(history: Ids, length: int) -> Ids:
    return history[len(history) - length :] if length <= len(history) else ()


def filtered_distribution(
    logits: ArrayLike,
    history: Sequence[int],
    settings: Settings = NO_FILTERS,
    prompt_length: int | None = None,
) -> Array:
    """The exact probabilities [V] that sampling draws the next token from.

    Args:
        logits: The model's scores of the next token [V].
        history: The prompt without its padding, and what was generated.
        settings: Which filters; they apply in the order of the fields of `Settings`.
        prompt_length: How many tokens of the history are the prompt's; None means all.
    """
    prompt_length = len(history) if prompt_length is None else prompt_length
    scores = constrain(np.asarray(logits), history, prompt_length, settings) / settings.temperature
    if settings.top_h is not None:
        best = np.argsort(-scores, kind="stable")[:100]
        log_p = log_softmax(scores[best])
        entropy = np.cumsum(np.where(np.isfinite(log_p), -np.exp(log_p) * log_p, 0))
        stays = entropy <= settings.top_h * entropy[-1]
        stays[0] = True
        kept = best[stays]
        scores = np.where(np.isin(np.arange(len(scores)), kept), scores, -np.inf)
    if settings.top_k:
        kth_best = np.sort(scores)[::-1][: settings.top_k][-1]
        scores = np.where(scores >= kth_best, scores, -np.inf)
    if settings.top_p < 1:
        scores = _keep(scores, np.argsort(-scores, kind="stable"), settings.top_p)
    if settings.min_p is not None:
        p = np.exp(log_softmax(scores))
        scores = np.where(p >= settings.min_p * p.max(), scores, -np.inf)
    if settings.typical_p < 1:
        log_p = log_softmax(scores)
        possible = np.isfinite(log_p)
        entropy = -np.sum(np.exp(log_p[possible]) * log_p[possible])
        oddness = np.abs(-log_p - entropy)
        scores = _keep(scores, np.argsort(oddness, kind="stable"), settings.typical_p)
    if settings.epsilon_cutoff:
        scores = _probable(scores, settings.epsilon_cutoff)
    if settings.eta_cutoff:
        log_p = log_softmax(scores)
        entropy = -np.sum(np.exp(log_p[np.isfinite(log_p)]) * log_p[np.isfinite(log_p)])
        eta = settings.eta_cutoff
        scores = _probable(scores, min(eta, eta**0.5 * np.exp(-entropy)))
    return np.exp(log_softmax(scores))


def _probable(scores: Array, least: float) -> Array:
    p = np.exp(log_softmax(scores))
    return np.where((p >= least) | (p == p.max()), scores, -np.inf)


def _keep(scores: Array, order: NDArray[np.intp], mass: float) -> Array:
    """Keeps tokens, in this order, as long as those before them have less than the mass."""
    p = np.exp(log_softmax(scores))[order]
    kept = order[np.cumsum(p) - p < mass]
    kept = kept if len(kept) else order[:1]
    filtered = np.full_like(scores, -np.inf)
    filtered[kept] = scores[kept]
    return filtered


def greedy(
    params: Params,
    config: OPTConfig,
    input_ids: ArrayLike,
    attention_mask: ArrayLike | None = None,
    *,
    max_new_tokens: int,
    settings: Settings = NO_FILTERS,
) -> NDArray[np.int64]:
    """The most probable token at each step, until every row has ended.

    Args:
        params: Canonical name -> array.
        config: The model's configuration.
        input_ids: Prompts [B, T].
        attention_mask: 1 at tokens, 0 at padding, [B, T]; None means no padding.
        max_new_tokens: How many tokens to add at most.
        settings: Filters, and the tokens that end a text.

    Returns:
        Prompts and new tokens [B, T + new]; rows that ended are filled with the pad token.
    """
    ids = np.array(input_ids, np.int64)
    mask = np.ones_like(ids) if attention_mask is None else np.array(attention_mask, np.int64)
    prompt_lengths = mask.sum(axis=1)
    open_rows = np.ones(len(ids), bool)
    for _ in range(max_new_tokens):
        logits = forward(params, config, ids, mask).logits[:, -1]
        column = np.full(len(ids), config.pad_token_id or 0)
        for row in np.flatnonzero(open_rows):
            history = ids[row][mask[row] > 0]
            column[row] = constrain(logits[row], history, prompt_lengths[row], settings).argmax()
        ids = np.concatenate([ids, column[:, None]], axis=1)
        mask = np.concatenate([mask, open_rows[:, None]], axis=1)
        open_rows &= ~np.isin(column, settings.eos_token_ids)
        if not open_rows.any():
            break
    return ids


class Hypothesis(NamedTuple):
    """A finished continuation: its score, log p / length ** length_penalty, and its new tokens."""

    score: float
    tokens: Ids


def beam_search(
    params: Params,
    config: OPTConfig,
    prompt: Sequence[int],
    *,
    num_beams: int,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
    settings: Settings = NO_FILTERS,
) -> list[Hypothesis]:
    """Beam search over one prompt without padding.

    At each step the best `(1 + number of end tokens) * num_beams` continuations are looked at, and
    no fewer than twice `num_beams`. Those that end count as finished only if they are among the
    first `num_beams`; the best `num_beams` of the others stay open. At the length limit all end.

    Args:
        params: Canonical name -> array.
        config: The model's configuration.
        prompt: Token ids, no padding.
        num_beams: How many continuations are kept open, W.
        max_new_tokens: How many tokens to add at most.
        length_penalty: Exponent of the number of new tokens that divides the sum of log p.
        early_stopping: True stops with `num_beams` finished; False stops when the best open beam's
            score, at its present length, is no better than the worst of them; "never" asks that of
            the score it could have at the length limit, where the penalty favours long texts.
        settings: Filters (they act on log p, which is not normalised again), and the end tokens.

    Returns:
        Up to `num_beams` continuations, best first; the first ones are what
        `num_return_sequences` returns.
    """
    looked_at = max(2, 1 + len(settings.eos_token_ids)) * num_beams
    beams: list[tuple[float, Ids]] = [(0.0, ())]
    finished: list[Hypothesis] = []
    for length in range(1, max_new_tokens + 1):
        candidates = sorted(
            _continuations(params, config, prompt, beams, settings), key=lambda c: -c[0]
        )
        beams = []
        for rank, (log_p, tokens) in enumerate(candidates[:looked_at]):
            if tokens[-1] not in settings.eos_token_ids and length < max_new_tokens:
                beams.append((log_p, tokens))
            elif rank < num_beams:
                finished.append(Hypothesis(log_p / length**length_penalty, tokens))
        beams = beams[:num_beams]
        finished = sorted(finished, key=lambda h: -h.score)[:num_beams]
        if not beams:
            break
        if len(finished) == num_beams:
            to_the_limit = early_stopping == "never" and length_penalty > 0
            divisor = (max_new_tokens if to_the_limit else length) ** length_penalty
            if early_stopping is True or beams[0][0] / divisor <= finished[-1].score:
                break
    return finished


def _continuations(
    params: Params,
    config: OPTConfig,
    prompt: Sequence[int],
    beams: Sequence[tuple[float, Ids]],
    settings: Settings,
) -> list[tuple[float, Ids]]:
    """Every possible next step of every beam, with the sum of log p."""
    ids = [[*prompt, *tokens] for _, tokens in beams]
    log_p = log_softmax(forward(params, config, ids).logits[:, -1])
    return [
        (so_far + float(score), (*tokens, token))
        for (so_far, tokens), history, row in zip(beams, ids, log_p, strict=True)
        for token, score in enumerate(constrain(row, history, len(prompt), settings))
        if math.isfinite(score)
    ]


def pad_rows(
    prompt: Sequence[int], hypotheses: Sequence[Hypothesis], pad_token_id: int
) -> NDArray[np.int64]:
    """Prompt and continuations as one array, short ones filled with the pad token on the right."""
    width = len(prompt) + max(len(h.tokens) for h in hypotheses)
    rows = np.full((len(hypotheses), width), pad_token_id, np.int64)
    for row, hypothesis in zip(rows, hypotheses, strict=True):
        whole = [*prompt, *hypothesis.tokens]
        row[: len(whole)] = whole
    return rows


def exhaustive_search(
    params: Params,
    config: OPTConfig,
    prompt: Sequence[int],
    *,
    max_new_tokens: int,
    length_penalty: float = 1.0,
    settings: Settings = NO_FILTERS,
) -> list[Hypothesis]:
    """Every continuation there is, best first: for a vocabulary and a length that are tiny.

    Args:
        params: Canonical name -> array.
        config: The model's configuration.
        prompt: Token ids, no padding.
        max_new_tokens: Length of the continuations that do not end before.
        length_penalty: Exponent of the number of new tokens that divides the sum of log p.
        settings: Filters, and the tokens that end a text.
    """
    unfinished: list[tuple[float, Ids]] = [(0.0, ())]
    found: list[Hypothesis] = []
    for length in range(1, max_new_tokens + 1):
        steps = _continuations(params, config, prompt, unfinished, settings)
        unfinished = []
        for log_p, tokens in steps:
            if tokens[-1] in settings.eos_token_ids or length == max_new_tokens:
                found.append(Hypothesis(log_p / length**length_penalty, tokens))
            else:
                unfinished.append((log_p, tokens))
    return sorted(found, key=lambda h: -h.score)
