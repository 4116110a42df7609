"""A backend's engine, as the scheduler sees it: rows of a static cache, each of its own length.

It takes and gives NumPy's arrays. R is the number of rows here; a row nobody uses is computed all
the same where a program has one shape, and what it writes lies behind all that counts.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.request import Ids, Mask, Request
from opt_core.generation.rules import FEWEST_CANDIDATES, Structure, make_rules
from opt_core.serving.row import TokenScores

ALTERNATIVES = 5
"""Likeliest tokens that scores name, as many as OpenAI's API gives."""

FEWEST_WIDTH = 128
"""Cache slots of each row, at least; there are twice as many, and so on, once a row needs them."""


class Table:
    """All that is known of the rows.

    Args:
        rows: Rows R.
        window: Most tokens of a row.

    Attributes:
        ids: (R, window + 1) tokens, the newest one not in the cache yet.
        counts: (R,) how many of them there are.
        held: (R,) how many of them the cache holds.
        made: (R,) how many of them were generated.
        is_active: bool (R,), whether a row's prompt is read and it has not ended.
        is_scored: bool (R,), whether its tokens' scores are wanted.
    """

    def __init__(self, rows: int, window: int) -> None:
        self.ids: Ids = np.zeros((rows, window + 1), np.int32)
        self.counts, self.held, self.made = (np.zeros(rows, np.int32) for _ in range(3))
        self.is_active: Mask = np.zeros(rows, bool)
        self.is_scored: Mask = np.zeros(rows, bool)

    @property
    def newest(self) -> Ids:
        """(R,) the token that a row reads next; any where there is none."""
        places = np.maximum(self.counts - 1, 0)
        return np.take_along_axis(self.ids, places[:, None], 1)[:, 0]


class Scores(NamedTuple):
    """`TokenScores` of X tokens: (X,), (X, ALTERNATIVES) and (X, ALTERNATIVES) arrays.

    They are NumPy's where an engine returns them, and its framework's inside of it.
    """

    logprob: Any
    ids: Any
    logprobs: Any

    def at(self, place: int) -> TokenScores:
        """Those of one token."""
        return TokenScores(
            float(self.logprob[place]), self.ids[place].tolist(), self.logprobs[place].tolist()
        )


class Chosen(NamedTuple):
    """The next token of each of X rows, in arrays as those of `Scores`.

    Attributes:
        tokens: (X,) ids.
        best: (X,) the largest logit they were chosen by: not finite where none can come.
        scores: Their scores; of rows that want none, any.
    """

    tokens: Any
    best: Any
    scores: Scores


@dataclass(frozen=True)
class RowRules:
    """The rules of all rows for compiled programs: the same names for every row, and all arrays.

    Attributes:
        numbers: Those of `opt_core.generation.rules.NUMBERS` that rows may have, (R, ...).
        seeds: (R,) int64.
        kinds: (R,) which of `STRUCTURES` a row's token is chosen by.
    """

    numbers: dict[str, NDArray[Any]]
    seeds: NDArray[np.int64]
    kinds: Ids

    @classmethod
    def allocate(cls, rows: int, vocab_size: int) -> "RowRules":
        """Rules that change nothing, for so many rows and ids V."""
        wide = {"bias": np.float32, "begin_bias": np.float32, "ends": np.bool_}
        numbers = {name: np.full(rows, value) for name, value in _NEUTRAL.items()}
        numbers |= {name: np.zeros((rows, vocab_size), kind) for name, kind in wide.items()}
        return cls(numbers, np.zeros(rows, np.int64), np.zeros(rows, np.int32))

    def place(self, slot: int, request: Request) -> None:
        """Puts a request's rules into a row."""
        structure, numbers = make_rules(request, is_compiled=True)
        for name, values in self.numbers.items():
            values[slot] = numbers.get(name, _NEUTRAL.get(name))
        self.seeds[slot] = request.seed
        is_wide = structure.candidates > FEWEST_CANDIDATES
        self.kinds[slot] = (1 + is_wide) if structure.do_sample else 0


_NEUTRAL = {
    "vocabulary": np.int32(0), "repetition_penalty": np.float32(1), "min_length": np.int32(0),
    "min_new_tokens": np.int32(0), "temperature": np.float32(1), "top_k": np.int32(2**31 - 1),
    "top_p": np.float32(2), "min_p": np.float32(0),
}  # fmt: skip


def structures(vocab_size: int) -> tuple[Structure, ...]:
    """The ways that rows' tokens are chosen in a compiled program.

    The likeliest; one of a few; one of all. A row alone may have another number of candidates, but
    draws the same: noise goes to candidates by their rank, and top_k hides those behind it.
    """
    few = min(FEWEST_CANDIDATES, vocab_size)
    return (Structure(), *(Structure(do_sample=True, candidates=C) for C in (few, vocab_size)))


class Engine(ABC):
    """A model with a cache of R rows.

    Args:
        model: The language model.
        slots: Rows R.

    Attributes:
        width: Cache slots S of each row.
    """

    is_compiled: ClassVar[bool]
    """Whether programs are compiled: reading a few tokens then takes as long as a whole chunk."""
    width: int

    def __init__(self, model: Any, slots: int) -> None:
        if model.attn_implementation == "flash_attention_2":
            raise GenerationError(
                'attn_implementation="flash_attention_2" takes rows of one length; '
                'serving needs "sdpa" or "eager"'
            )
        self.model, self.slots, self.width = model, slots, FEWEST_WIDTH

    @property
    def config(self) -> OPTConfig:
        """The model's configuration."""
        return self.model.config

    @abstractmethod
    def place(self, slot: int, request: Request) -> None:
        """Gives a row another request's rules."""

    @abstractmethod
    def resize(self, width: int) -> None:
        """Gives every row another number of cache slots; what does not fit is forgotten."""

    @abstractmethod
    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first tokens of one row's cache, at least `count`, to another row."""

    @abstractmethod
    def read(
        self, table: Table, slot: int, start: int, end: int, chunk: int, scores_prompt: bool
    ) -> tuple[Chosen | None, Scores | None]:
        """Reads some tokens of a row into its cache.

        Args:
            table: What is known of all rows.
            slot: The row.
            start: First token to read; those before it are in the cache.
            end: Token behind the last one; at most `chunk` behind the first.
            chunk: Tokens that a program reads; where it has one shape, those behind `end` do not
                count.
            scores_prompt: Whether scores of the prompt are wanted.

        Returns:
            The token behind the last one, if the row has no more to read; and the scores of the
            tokens behind each that was read, as far as the row has them.
        """

    @abstractmethod
    def step(self, table: Table) -> Chosen:
        """Reads the newest token of every active row and chooses the next, for all R rows."""
