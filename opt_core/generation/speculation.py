"""Speculative decoding, as far as it needs no framework: guesses, and what becomes of them.

Several tokens are guessed, one pass of the model says how many of them are right, and that pass
gives one more (arXiv 2211.17192). Rows are right about different numbers of guesses: `Rows` knows
what each has, `Slots` which slots of the cache hold it.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.text.detokenizer import StopStringTracker
from opt_core.text.tokenizer import OPTTokenizer

Ids = NDArray[np.int32]
Mask = NDArray[np.bool_]
Counts = NDArray[np.int32]


def look_up(text: Sequence[int], count: int, longest: int) -> list[int]:
    """Guesses how a text goes on: as it did after the last tokens the last time they occurred.

    Args:
        text: Token ids.
        count: Tokens to guess.
        longest: Most tokens to look for; where they do not occur, fewer are looked for.

    Returns:
        `count` ids, or none if the last token is new. Where the earlier place is so near that what
        follows it runs into the end of the text, it is taken to repeat itself.
    """
    ids = np.asarray(text, np.int32)
    for size in range(min(longest, len(ids) - 1), 0, -1):
        # The last window is left out: it is what is looked for.
        windows = np.lib.stride_tricks.sliding_window_view(ids[:-1], size)
        places = np.flatnonzero((windows == ids[-size:]).all(1))
        if len(places):
            start = int(places[-1]) + size
            return ids[start + np.arange(count) % (len(ids) - start)].tolist()
    return []


def check_assistant(settings: GenerationConfig, config: OPTConfig, assistant: OPTConfig) -> None:
    """Refuses a model whose guesses would be of no use to another.

    Args:
        settings: What to generate.
        config: Configuration of the model that checks.
        assistant: Configuration of the model that guesses.

    Raises:
        GenerationError: It has other ids or a shorter window, or the settings leave no place for
            it.
    """
    name = "assistant_model"
    if settings.prompt_lookup_num_tokens is not None:
        raise GenerationError(f"{name} and prompt_lookup_num_tokens both guess; choose one")
    if settings.is_beam_search:
        raise GenerationError(f"num_beams > 1 with {name} is not supported")
    if assistant.vocab_size != config.vocab_size:
        raise GenerationError(
            f"{name}: expected the model's vocab_size={config.vocab_size}, "
            f"received {assistant.vocab_size}"
        )
    if assistant.max_position_embeddings < config.max_position_embeddings:
        raise GenerationError(
            f"{name}: expected at least the model's max_position_embeddings="
            f"{config.max_position_embeddings}, received {assistant.max_position_embeddings}"
        )


class Slots:
    """Which slots of a cache hold tokens, where every row is given the same slots.

    A row keeps fewer of them than another where its guesses were wrong: the rest are gaps, hidden
    by the mask as padding is. Positions count tokens, so a gap changes nothing.

    Args:
        mask: bool (R, T) of the prompts, False at padding.
        total: Slots S there are.

    Attributes:
        mask: bool (R, S), False at gaps and padding, True at free slots.
        length: Slots in use.
    """

    def __init__(self, mask: Mask, total: int) -> None:
        self.length = mask.shape[1]
        free = np.ones((len(mask), total - self.length), bool)
        self.mask = np.concatenate([mask, free], 1)

    @property
    def is_plain(self) -> bool:
        """Whether there are neither gaps nor padding."""
        return bool(self.mask.all())

    def has_room(self, count: int) -> bool:
        """Whether `count` more slots are free."""
        return self.length + count <= self.mask.shape[1]

    def keep(self, counts: Counts) -> None:
        """Of the slots that follow, each row keeps its first `counts` ones, (R,)."""
        start, self.length = self.length, self.length + int(counts.max())
        self.mask[:, start : self.length] = np.arange(self.length - start) < counts[:, None]

    def pack(self) -> Ids:
        """Closes the gaps: moves every row's tokens to the end of as few slots as there can be.

        Returns:
            (R, S) for each slot, where its content is now.
        """
        used = self.mask[:, : self.length]
        order = np.argsort(used, 1, kind="stable").astype(np.int32)  # gaps first
        length = int(used.sum(1).max())
        order = order[:, self.length - length :]
        mask = np.take_along_axis(used, order, 1)
        free = self.mask.shape[1] - length
        self.mask, self.length = np.pad(mask, ((0, 0), (0, free)), constant_values=True), length
        return np.pad(order, ((0, 0), (0, free)))


class Rows:
    """The tokens that each row has so far.

    Args:
        ids: (B, T) prompts.
        mask: bool (B, T), False at padding.
        settings: What to generate; each prompt gives `num_return_sequences` rows.
        new_tokens: Most tokens to add.
        tokenizer: For stop strings.
        pad: Id that fills a finished row.

    Attributes:
        texts: Each row's tokens, padding left out.
        prompts: (R,) how many of them are the prompt's.
        ended: bool (R,).
    """

    def __init__(
        self,
        ids: Ids,
        mask: Mask,
        settings: GenerationConfig,
        new_tokens: int,
        tokenizer: OPTTokenizer | None,
        pad: int,
    ) -> None:
        copies = settings.num_return_sequences
        prompts = [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
        self.texts: list[list[int]] = [list(p) for p in prompts for _ in range(copies)]
        self.prompts = np.array([len(text) for text in self.texts], np.int32)
        self.ended = np.zeros(len(self.texts), bool)
        self._eos, self._new_tokens, self._pad = frozenset(settings.eos_ids), new_tokens, pad
        self._shown = 0
        self._trackers: list[StopStringTracker] = []
        if tokenizer is not None and settings.stops:
            self._trackers = [StopStringTracker(tokenizer, settings.stops) for _ in self.texts]

    @property
    def no_guesses(self) -> Ids:
        """(R, 0) ids."""
        return np.zeros((len(self.texts), 0), np.int32)

    @property
    def made(self) -> Counts:
        """(R,) tokens generated."""
        return np.array([len(text) for text in self.texts], np.int32) - self.prompts

    @property
    def wanted(self) -> Counts:
        """(R,) guesses of use at most: the pass that checks them gives one more token."""
        return np.where(self.ended, 0, self._new_tokens - self.made - 1).astype(np.int32)

    def newest(self, count: int) -> Ids:
        """(R, count) the last tokens."""
        return np.array([text[-count:] for text in self.texts], np.int32)

    def look_up(self, count: int, longest: int) -> tuple[Ids, Counts]:
        """Guesses by `look_up`: (R, count) ids, and how many of them there are, (R,)."""
        guesses = np.full((len(self.texts), count), self._pad, np.int32)
        counts = np.zeros(len(self.texts), np.int32)
        for row, wanted in enumerate(self.wanted.tolist()):
            found = look_up(self.texts[row], min(count, wanted), longest) if wanted else []
            guesses[row, : len(found)], counts[row] = found, len(found)
        return guesses, counts

    def positions(self, count: int, newest: int) -> Ids:
        """(R, count) positions, from that of the `newest` last token on."""
        lengths = np.array([len(text) for text in self.texts], np.int32)
        return lengths[:, None] - newest + np.arange(count, dtype=np.int32)

    def histories(self, guesses: Ids, width: int) -> tuple[Ids, Mask, Counts]:
        """The ids that logits processors look at, for a row's next token and that after each guess.

        Args:
            guesses: (R, G) ids.
            width: At least as many as the tokens of any row with its guesses.

        Returns:
            (R, G + 1, width) ids that end where a history ends; which of them are real; and how
            many of them were generated, (R, G + 1).
        """
        R, G = guesses.shape
        ids = np.full((R, width), self._pad, np.int32)
        real = np.zeros((R, width + G), bool)
        for row, text in enumerate(self.texts):
            ids[row, width - len(text) :], real[row, width - len(text) :] = text, True
        whole = np.concatenate([ids, guesses], 1)
        ids, real = (
            np.lib.stride_tricks.sliding_window_view(x, width, 1).copy() for x in (whole, real)
        )
        return ids, real, self.made[:, None] + np.arange(G + 1, dtype=np.int32)

    def take(self, tokens: Ids, counts: Counts) -> Counts:
        """Adds to each row its first tokens, as far as its end.

        Args:
            tokens: (R, any) ids.
            counts: (R,) how many of them there are.

        Returns:
            (R,) how many were added; none where a row had ended.
        """
        taken = np.zeros(len(self.texts), np.int32)
        for row in np.flatnonzero(~self.ended).tolist():
            text, limit = self.texts[row], int(self.prompts[row]) + self._new_tokens
            for token in tokens[row, : counts[row]].tolist():
                text.append(token)
                taken[row] += 1
                is_last = token in self._eos or len(text) == limit
                if self._trackers:
                    is_last |= self._trackers[row].push(token)
                if is_last:
                    self.ended[row] = True
                    break
        return taken

    def columns(self) -> Iterator[Ids]:
        """The tokens, (R,) each, that every row has, or has ended before, and that are new."""
        made = self.made
        known = int(made.max() if self.ended.all() else made[~self.ended].min())
        prompts = self.prompts.tolist()
        for place in range(self._shown, known):
            self._shown = place + 1
            found = [
                text[n + place : n + place + 1] for text, n in zip(self.texts, prompts, strict=True)
            ]
            yield np.array([(token or [self._pad])[0] for token in found], np.int32)
