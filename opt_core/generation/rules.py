"""The rules that next tokens are chosen by, made once per request for whatever computes them.

A compiled program is told apart by a `Structure` alone. All else that it needs is an array which it
is given at each call: another temperature, end token or list of banned words finds the program made
already. Filters whose work is small are in every program, at a value that changes nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Request

BANNED = float("-inf")
"""Logit of a token that cannot come."""

TOP_H_TOKENS = 100
"""Likeliest tokens that `top_h` looks at."""

FEWEST_CANDIDATES = 64
"""Candidates of a compiled program that draws, at least."""

_FEWEST_WORDS = 8
_SHORTEST = 4
_ALWAYS = 2.0
"""A sum of probabilities that is never reached: nothing is left out."""
_NEVER = 2**30
"""A number of new tokens that is never reached."""


class Structure(NamedTuple):
    """The part of the rules that a program of generation is made for.

    Attributes:
        do_sample: Whether tokens are drawn.
        num_return_sequences: Rows of each prompt.
        num_beams: Beams W of each prompt.
        candidates: Likeliest tokens C that are drawn among at most; 0 where none are drawn.
        longest_ngram: Most tokens of the n-grams that may not come again; 0: nothing is looked for.
        end_tokens: At least as many as the ids that end a beam.
        renormalize_logits: Whether the filtered logits are made log-probabilities.
        fewest: Likeliest tokens that no filter leaves out.
    """

    do_sample: bool = False
    num_return_sequences: int = 1
    num_beams: int = 1
    candidates: int = 0
    longest_ngram: int = 0
    end_tokens: int = 1
    renormalize_logits: bool = False
    fewest: int = 1


class Rules:
    """A `Structure` and the arrays that go with it, one name space.

    Args:
        structure: What a program is made for.
        numbers: By name, what it is given each time: those of `make_rules`, in the framework's
            tensors, and what else the framework's programs are given. A rule that is not in use is
            not there, and None.
    """

    def __init__(self, structure: Structure, numbers: Mapping[str, Any]) -> None:
        self.structure, self.numbers = structure, numbers

    def __getattr__(self, name: str) -> Any:
        numbers = self.__dict__["numbers"]
        if name in numbers:
            return numbers[name]
        return None if name in NUMBERS else getattr(self.__dict__["structure"], name)

    def replace(self, **numbers: Any) -> "Rules":
        """The rules with other numbers."""
        return Rules(self.structure, {**self.numbers, **numbers})


NUMBERS: Mapping[str, str] = {
    "new_tokens": "most tokens to add",
    "vocabulary": "ids below this one may come",
    "bias": "float32 (V,), added to the logits: -inf for ids that never come",
    "begin_bias": "the same for the first new token",
    "ends": "bool (V,), ids that end a row",
    "pad": "id that fills a row after its end",
    "words": "ids of sequences with a bias, one each, -1 before the first",
    "word_bias": "float32, added to the logit of a word's last id behind its others",
    "repetition_penalty": "see `GenerationConfig`, like what follows",
    "no_repeat_ngram_size": "0 is off",
    "min_length": "",
    "min_new_tokens": "",
    "forced_end": "bool (V,), the only ids for the last new token; none: any may come",
    "decay_start": "new tokens from which on the end grows likelier",
    "decay_factor": "by this factor with each token",
    "is_repaired": "True: logits that are no numbers are replaced",
    "temperature": "",
    "top_k": "",
    "top_h": "",
    "top_p": "",
    "min_p": "",
    "typical_p": "",
    "epsilon_cutoff": "",
    "eta_cutoff": "",
    "length_penalty": "",
    "is_full_enough": "whether a search ends with W finished beams (`early_stopping`)",
    "is_hopeful": "whether an open beam is given the length that favours it most",
}
"""The numbers there are, and what they mean."""


def make_rules(request: Request, is_compiled: bool) -> tuple[Structure, dict[str, Any]]:
    """The rules of a request.

    Args:
        request: What to generate.
        is_compiled: Whether programs are made of them: their shapes are then rounded up, and what
            costs little is there though it changes nothing. Otherwise rules are what is in use.

    Returns:
        What tells programs apart; and `NUMBERS` by name, NumPy arrays and scalars.
    """
    settings = request.settings
    numbers = _vocabulary(request, is_compiled) | _history(settings, is_compiled)
    numbers |= _ends(request, is_compiled)
    if settings.do_sample:
        numbers |= _sampling(settings, is_compiled)
    if settings.is_beam_search:
        numbers["length_penalty"] = np.float32(settings.length_penalty)
        numbers["is_full_enough"] = np.bool_(settings.early_stopping is True)
        numbers["is_hopeful"] = np.bool_(
            settings.early_stopping == "never" and settings.length_penalty > 0
        )
    return make_structure(request, is_compiled), numbers


def make_structure(request: Request, is_compiled: bool) -> Structure:
    """The structure of `make_rules` alone, which takes no arrays: it is asked for at each step."""
    settings, sampling = request.settings, request.settings.do_sample
    return Structure(
        do_sample=sampling,
        num_return_sequences=settings.num_return_sequences,
        num_beams=settings.num_beams,
        candidates=_candidates(request, is_compiled) if sampling else 0,
        longest_ngram=_longest_ngram(settings, is_compiled),
        end_tokens=_round_up(len(settings.eos_ids), 1) if settings.is_beam_search else 1,
        renormalize_logits=settings.renormalize_logits,
        # A beam must be able to go on whichever way it may end.
        fewest=1 + len(settings.eos_ids) if sampling and settings.is_beam_search else 1,
    )


def _round_up(count: int, least: int) -> int:
    """The smallest power of two times `least` that is not below a count."""
    while least < count:
        least *= 2
    return least


def _candidates(request: Request, is_compiled: bool) -> int:
    V = request.vocab_size
    k = request.settings.top_k or V
    if request.settings.top_h is not None:
        k = max(k, TOP_H_TOKENS)
    return min(V, _round_up(k, FEWEST_CANDIDATES) if is_compiled else k)


def _words(settings: GenerationConfig) -> dict[tuple[int, ...], float]:
    """Sequences of ids and what is added to the logit of their last one."""
    words = settings.biases
    banned = set(settings.bad_words_ids or ()) - {(i,) for i in settings.eos_ids}
    return words | dict.fromkeys(sorted(banned), BANNED)


def _vocabulary(request: Request, is_compiled: bool) -> dict[str, Any]:
    """Which single ids may come, and their biases."""
    settings, V = request.settings, request.vocab_size
    bias = np.zeros(V, np.float32)
    for word, value in _words(settings).items():
        if len(word) == 1:
            bias[word[0]] += np.float32(value)
    bias[list(settings.suppress_tokens or ())] = BANNED
    begin = bias.copy()
    begin[list(settings.begin_suppress_tokens or ())] = BANNED
    if settings.forced_bos_token_id is not None and request.ids.shape[1] == 1:
        begin = _all_but(V, (settings.forced_bos_token_id,))
    named = {"bias": bias, "begin_bias": begin}
    if not is_compiled:
        named = {name: values for name, values in named.items() if values.any()}
    return named | {"vocabulary": np.int32(request.vocabulary)}


def _all_but(V: int, ids: Sequence[int]) -> NDArray[np.float32]:
    bias = np.full(V, BANNED, np.float32)
    bias[list(ids)] = 0
    return bias


def _longest_ngram(settings: GenerationConfig, is_compiled: bool) -> int:
    if not _looks_back(settings):
        return 0
    size = settings.no_repeat_ngram_size
    return _round_up(size, _SHORTEST) if is_compiled else size


def _looks_back(settings: GenerationConfig) -> bool:
    """Whether a filter reads what the rows have."""
    has_words = any(len(word) > 1 for word in _words(settings))
    return has_words or settings.repetition_penalty != 1 or settings.no_repeat_ngram_size > 0


def _history(settings: GenerationConfig, is_compiled: bool) -> dict[str, Any]:
    """Numbers of the filters that read what the rows have."""
    if not _looks_back(settings):
        return {}
    words = {word: value for word, value in _words(settings).items() if len(word) > 1}
    count, length = len(words), max(map(len, words), default=2)
    if is_compiled:
        count, length = _round_up(count, _FEWEST_WORDS), _round_up(length, _SHORTEST)
    ids, bias = np.full((count, length), -1, np.int32), np.zeros(count, np.float32)
    ids[:, -1] = 0
    for row, (word, value) in enumerate(words.items()):
        ids[row, length - len(word) :], bias[row] = word, value
    numbers: dict[str, Any] = {}
    if is_compiled or words:
        numbers |= {"words": ids, "word_bias": bias}
    if is_compiled or settings.repetition_penalty != 1:
        numbers["repetition_penalty"] = np.float32(settings.repetition_penalty)
    if is_compiled or settings.no_repeat_ngram_size:
        numbers["no_repeat_ngram_size"] = np.int32(settings.no_repeat_ngram_size)
    return numbers


def _ends(request: Request, is_compiled: bool) -> dict[str, Any]:
    """Numbers that decide where rows end."""
    settings = request.settings
    ends = np.zeros(request.vocab_size, bool)
    ends[list(settings.eos_ids)] = True
    new_tokens, pad = np.int32(request.new_tokens), np.int32(request.pad)
    numbers: dict[str, Any] = {"ends": ends, "new_tokens": new_tokens, "pad": pad}
    fewest = settings.min_new_tokens or 0
    if is_compiled or (settings.eos_ids and (settings.min_length or fewest)):
        numbers["min_length"] = np.int32(settings.min_length)
        numbers["min_new_tokens"] = np.int32(fewest)
    if is_compiled or settings.forced_eos_ids:
        numbers["forced_end"] = np.isin(np.arange(request.vocab_size), settings.forced_eos_ids)
    decay = settings.exponential_decay_length_penalty
    if is_compiled or decay is not None:
        start, factor = decay or (_NEVER, 1)
        numbers |= {"decay_start": np.int32(start), "decay_factor": np.float32(factor)}
    if settings.remove_invalid_values:
        numbers["is_repaired"] = np.bool_(True)
    return numbers


def _sampling(settings: GenerationConfig, is_compiled: bool) -> dict[str, Any]:
    """Numbers that decide among which tokens is drawn."""
    numbers: dict[str, Any] = {}
    if is_compiled or settings.temperature != 1:
        numbers["temperature"] = np.float32(settings.temperature)
    if is_compiled or (settings.top_h is not None and settings.top_k):
        numbers["top_k"] = np.int32(settings.top_k or 2**31 - 1)
    if is_compiled or settings.top_p < 1:
        numbers["top_p"] = np.float32(settings.top_p if settings.top_p < 1 else _ALWAYS)
    if is_compiled or settings.min_p is not None:
        numbers["min_p"] = np.float32(settings.min_p or 0)
    if settings.typical_p < 1:
        numbers["typical_p"] = np.float32(settings.typical_p)
    if settings.top_h is not None:
        numbers["top_h"] = np.float32(settings.top_h)
    for name in ("epsilon_cutoff", "eta_cutoff"):
        if is_compiled or getattr(settings, name):
            numbers[name] = np.float32(getattr(settings, name))
    return numbers
