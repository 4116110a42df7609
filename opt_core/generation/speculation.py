"""Speculative decoding, as far as it needs no framework: drafts, and what becomes of them.

Several tokens are drafted, one pass of the model says how many of them are right, and that pass
gives one more (arXiv 2211.17192). Rows are right about different numbers of them: `Rows` knows
what each has, `Slots` which slots of the cache hold it. A backend's `Reader` does the reading.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Ids, Mask, Request, bucket

Counts = NDArray[np.int32]


def prompt_lookup(text: Sequence[int], count: int, longest: int) -> list[int]:
    """Drafts how a text goes on: as it did after the last tokens the last time they occurred.

    Args:
        text: Token ids.
        count: Tokens to draft.
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
    """Refuses a model whose drafts would be of no use to another.

    Args:
        settings: What to generate.
        config: Configuration of the model that checks.
        assistant: Configuration of the model that drafts.

    Raises:
        GenerationError: It has other ids or a shorter window, or the settings leave no place for
            it.
    """
    name = "assistant_model"
    if settings.prompt_lookup_num_tokens is not None:
        raise GenerationError(f"{name} and prompt_lookup_num_tokens both draft; choose one")
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

    A row keeps fewer of them than another where its draft was wrong: the rest are gaps, hidden
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
        request: What to generate; each prompt gives `num_return_sequences` rows.

    Attributes:
        texts: Each row's tokens, padding left out.
        prompts: (R,) how many of them are the prompt's.
        ended: bool (R,).
    """

    def __init__(self, request: Request) -> None:
        settings = request.settings
        pairs = zip(request.ids, request.full_mask(), strict=True)
        prompts = [row[mask].tolist() for row, mask in pairs]
        self.texts: list[list[int]] = [
            list(p) for p in prompts for _ in range(settings.num_return_sequences)
        ]
        self.prompts = np.array([len(text) for text in self.texts], np.int32)
        self.ended = np.zeros(len(self.texts), bool)
        self._eos, self._pad = frozenset(settings.eos_ids), request.pad
        self._new_tokens, self._shown = request.new_tokens, 0
        self._trackers = request.stop_trackers(len(self.texts))

    @property
    def no_draft(self) -> Ids:
        """(R, 0) ids."""
        return np.zeros((len(self.texts), 0), np.int32)

    @property
    def made(self) -> Counts:
        """(R,) tokens generated."""
        return np.array([len(text) for text in self.texts], np.int32) - self.prompts

    @property
    def wanted(self) -> Counts:
        """(R,) drafted tokens of use at most: the pass that checks them gives one more token."""
        return np.where(self.ended, 0, self._new_tokens - self.made - 1).astype(np.int32)

    def newest(self, count: int) -> Ids:
        """(R, count) the last tokens."""
        return np.array([text[-count:] for text in self.texts], np.int32)

    def prompt_lookup(self, count: int, longest: int) -> tuple[Ids, Counts]:
        """Drafts by `prompt_lookup`: (R, count) ids, and how many of them there are, (R,)."""
        draft = np.full((len(self.texts), count), self._pad, np.int32)
        counts = np.zeros(len(self.texts), np.int32)
        for row, wanted in enumerate(self.wanted.tolist()):
            found = prompt_lookup(self.texts[row], min(count, wanted), longest) if wanted else []
            draft[row, : len(found)], counts[row] = found, len(found)
        return draft, counts

    def positions(self, count: int, newest: int) -> Ids:
        """(R, count) positions, from that of the `newest` last token on."""
        lengths = np.array([len(text) for text in self.texts], np.int32)
        return lengths[:, None] - newest + np.arange(count, dtype=np.int32)

    def histories(self, draft: Ids, width: int) -> tuple[Ids, Mask, Counts]:
        """The ids that logits processors look at, for a row's next token and after each drafted.

        Args:
            draft: (R, G) ids.
            width: At least as many as the tokens of any row with its draft.

        Returns:
            (R, G + 1, width) ids that end where a history ends; their mask, False where there is
            no token; and how many of them were generated, (R, G + 1).
        """
        R, G = draft.shape
        ids = np.full((R, width), self._pad, np.int32)
        mask = np.zeros((R, width + G), bool)
        for row, text in enumerate(self.texts):
            ids[row, width - len(text) :], mask[row, width - len(text) :] = text, True
        whole = np.concatenate([ids, draft], 1)
        ids, mask = (
            np.lib.stride_tricks.sliding_window_view(x, width, 1).copy() for x in (whole, mask)
        )
        return ids, mask, self.made[:, None] + np.arange(G + 1, dtype=np.int32)

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


class Reader(ABC):
    """A model and what it has read of some rows, for a backend to fill in.

    Args:
        model: The language model.
        request: What to generate; its prompts are read.
        rows: What each row has.
        slots: Slots S of the cache.

    Attributes:
        keys: The cache's buffers, one per layer.
        values: The cache's buffers, one per layer.
        slots: Which of its slots hold tokens.
    """

    keys: Any
    values: Any

    def __init__(self, model: Any, request: Request, rows: Rows, slots: int) -> None:
        self.model, self.request, self.rows = model, request, rows
        self.slots = Slots(
            request.full_mask().repeat(request.settings.num_return_sequences, 0), slots
        )

    @abstractmethod
    def first_tokens(self) -> Ids:
        """The token (R,) after each row's prompt.

        Raises:
            GenerationError: There is none for a row.
        """

    @abstractmethod
    def propose(self, count: int, step: int) -> tuple[Ids, Any]:
        """A draft, (R, up to `count`) ids, and the probabilities they were drawn by or None.

        The model that drafts is a token behind the other: then it has read what that one has,
        whatever was right.
        """

    @abstractmethod
    def check(self, draft: Ids, counts: Counts, probs: Any, step: int) -> tuple[Ids, Counts]:
        """The right tokens of a draft and one more, (R, any) ids, and how many count, (R,).

        Args:
            draft: (R, G) ids.
            counts: (R,) how many of them were drafted.
            probs: The probabilities (R, G, V) they were drawn by, or None.
            step: Number of the pass, from 1.
        """

    @abstractmethod
    def reorder(self, order: Ids) -> None:
        """Puts the buffers' slots in another order, (R, S)."""

    def keep(self, counts: Counts, room: int) -> None:
        """Forgets all but the first tokens of each row since `keep` was last called.

        Args:
            counts: (R,) how many each row keeps.
            room: Slots that must be free then: where they are not, gaps are closed.
        """
        self.slots.keep(counts)
        if not self.slots.has_room(room):
            self.reorder(self.slots.pack())

    def positions(self, count: int, newest: int) -> Ids:
        """As `Rows.positions`, within the model's window: drafts may go beyond it."""
        last = self.model.config.max_position_embeddings - 1
        return np.minimum(self.rows.positions(count, newest), last)

    def histories(self, draft: Ids) -> tuple[Ids, Mask, Counts]:
        """As `Rows.histories`, as wide as the cache."""
        return self.rows.histories(draft, self.slots.mask.shape[1])


def speculate(
    model: Any, request: Request, reader: Callable[[Any, Request, Rows, int], Reader]
) -> Iterator[Ids]:
    """Drafts, checks and yields until every row has ended.

    Args:
        model: The language model.
        request: What to generate, with an assistant or `prompt_lookup_num_tokens`.
        reader: The backend's `Reader`.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended; several in a row
        where drafts were right.

    Raises:
        GenerationError: No token can come in a row.
    """
    settings, assistant = request.settings, request.assistant
    lookup = settings.prompt_lookup_num_tokens
    most = settings.num_assistant_tokens if lookup is None else lookup
    rows = Rows(request)
    # Gaps take slots too, until they are closed.
    gaps = 0 if len(rows.texts) == 1 else request.new_tokens
    slots = bucket(request.ids.shape[1] + request.new_tokens + most + gaps)
    target = reader(model, request, rows, slots)
    first = target.first_tokens()
    draft = None if assistant is None else reader(assistant, _behind(request), rows, slots)
    rows.take(first[:, None], np.ones(len(first), np.int32))
    for step in count(1):
        yield from rows.columns()
        if rows.ended.all():
            return
        probs = None
        if draft is None:
            tokens, counts = rows.prompt_lookup(most, settings.max_matching_ngram_size)
            tokens = tokens if counts.any() else rows.no_draft
        else:
            tokens, probs = draft.propose(most, step)
            counts = np.minimum(rows.wanted, most)
        taken = rows.take(*target.check(tokens, counts, probs, step))
        if not rows.ended.all():
            for each in (target, draft):
                if each is not None:
                    each.keep(taken, most + 1)


def _behind(request: Request) -> Request:
    """The prompts without their last token, and with padding before the first."""
    before = ((0, 0), (1, 0))
    ids = np.pad(request.ids[:, :-1], before, constant_values=request.pad)
    return replace(request, ids=ids, mask=np.pad(request.full_mask()[:, :-1], before), past=None)
