"""One row of a batch that rows enter and leave: its request, its text so far, and its end."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Request

SETTINGS = frozenset(
    [
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens"),
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty"),
        *("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "sequence_bias"),
        *("eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "use_cache"),
        *("prefill_chunk_size", "length_penalty", "early_stopping", "num_assistant_tokens"),
        *("max_matching_ngram_size", "diversity_penalty", "refused", "others"),
    ]
)
"""Settings that a row may have of its own, and those that have no effect on it."""


class TokenScores(NamedTuple):
    """How likely a token was, by the model alone: before temperature and filters.

    Attributes:
        logprob: Its log-probability.
        ids: The likeliest tokens at its place, `ALTERNATIVES` of them at most.
        logprobs: Their log-probabilities.
    """

    logprob: float
    ids: list[int]
    logprobs: list[float]


@dataclass(eq=False)
class Row:
    """A text that is being written.

    Args:
        request: What to generate: one prompt, one text of it (`opt_core.generation.mixin`'s
            `make_request`).
        is_scored: Whether the new tokens' probabilities are wanted.
        scores_prompt: Whether those of the prompt's tokens are wanted.

    Attributes:
        prompt: The prompt's ids, padding left out.
        made: The ids that were generated.
        prompt_scores: Scores of the prompt's tokens but the first, known with the first new token.
        ended: Why there is no more to come: "stop", "length", "cancelled" or "error"; None before.
        error: What was wrong with an `ended` of "error".
        is_cancelled: Set to True, it ends the row before the next step.

    Raises:
        GenerationError: A setting that rows cannot have one by one.
    """

    request: Request
    is_scored: bool = False
    scores_prompt: bool = False
    made: list[int] = field(default_factory=list[int], init=False)
    prompt_scores: list[TokenScores] = field(default_factory=list[TokenScores], init=False)
    ended: str | None = field(default=None, init=False)
    error: str | None = field(default=None, init=False)
    is_cancelled: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        check_row(self.request)
        self.prompt: list[int] = self.request.ids[0][self.request.full_mask()[0]].tolist()
        self._trackers = self.request.stop_trackers(1)

    def push(self, token: int) -> None:
        """Takes the next token, and ends the row if that ends it."""
        self.made.append(token)
        has_stop = [tracker.push(token) for tracker in self._trackers]
        if token in self.request.settings.eos_ids or any(has_stop):
            self.ended = "stop"
        elif len(self.made) == self.request.new_tokens:
            self.ended = "length"


def check_row(request: Request) -> None:
    """Refuses a request that cannot be one row among others.

    Raises:
        GenerationError: It is of several rows, or has a setting that only `generate` honours.
    """
    settings, default = request.settings, GenerationConfig()
    if len(request.ids) != 1 or settings.num_return_sequences != 1:
        raise GenerationError("a row is one prompt and one text: make a row of each")
    for name in (f.name for f in dataclasses.fields(settings)):
        if name not in SETTINGS and getattr(settings, name) != getattr(default, name):
            raise GenerationError(f"{name} is not served: rows have settings of their own; without")
    words = [*(settings.bad_words_ids or ()), *settings.biases]
    if any(len(word) > 1 for word in words):
        raise GenerationError("bad_words_ids and sequence_bias are served for single tokens only")
    parts: dict[str, Any] = {
        "assistant_model": request.assistant, "past_key_values": request.past,
        "inputs_embeds": request.embeds, "negative_prompt_ids": request.guide,
    }  # fmt: skip
    given = [name for name, value in parts.items() if value is not None]
    if given or not request.hooks.is_empty:
        raise GenerationError(f"{(*given, 'a function')[0]} is not served: call generate")
