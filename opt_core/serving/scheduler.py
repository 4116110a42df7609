"""Which rows are read and written, and when: they enter and leave a batch at any step.

A step writes one token of every row whose prompt is read, or reads one prompt as far as its turn
goes: a chunk of tokens is read before rows are written again, so that a long prompt keeps nobody
waiting for long. The shortest prompt comes first, and its first token is told before another is
read. What another row has read of the same beginning is copied. Every row gets the tokens that
`generate` gives its request alone.
"""

from collections import deque
from typing import NamedTuple

import numpy as np

from opt_core.errors import GenerationError
from opt_core.generation.request import check_logits
from opt_core.serving.engine import FEWEST_WIDTH, Chosen, Engine, Table
from opt_core.serving.row import Row, TokenScores

CHUNK = 256
"""Tokens of prompts that are read before rows are written: it takes as long as five new tokens."""

PROGRAM_CHUNK = 64
"""Tokens that a compiled program reads where few are left, for it takes as long for fewer.

Another one reads a whole chunk, from half of it on: that takes as long as three of these.
"""

WORTHWHILE = 8
"""Tokens from which on a common beginning is copied."""

HASTE = 4
"""As many tokens read of others count as one less to read: no prompt waits for ever."""

PATIENCE = 64
"""Times of reading or writing after which caches wider than any row needs are made narrower."""
LONG_PATIENCE = 16 * PATIENCE
"""The same where no programs are compiled."""


class Event(NamedTuple):
    """News of a row.

    Attributes:
        row: The row.
        token: Its next token; None: it ended without one.
        scores: That token's scores, if they are wanted.
        ended: Why the row ended with that; None: it goes on.
    """

    row: Row
    token: int | None
    scores: TokenScores | None
    ended: str | None


class Scheduler:
    """Rows that wait, rows whose prompts are read, and rows that are written.

    Args:
        engine: A backend's.
        chunk: Tokens of prompts to read before rows are written again.
    """

    def __init__(self, engine: Engine, chunk: int = CHUNK) -> None:
        window = engine.config.max_position_embeddings
        self.engine, self.chunk = engine, chunk
        self.table = Table(engine.slots, window)
        self.rows: list[Row | None] = [None] * engine.slots
        self.waiting, self.reading = deque[Row](), dict[int, int]()  # and what was read before
        self._free = list(range(engine.slots))  # the longest free one first
        self._widths = [FEWEST_WIDTH]
        while self._widths[-1] < window:
            self._widths.append(2 * self._widths[-1])
        self._chunks = [min(size, self._widths[-1]) for size in (min(PROGRAM_CHUNK, chunk), chunk)]
        self._calm = self._spent = self._budget = 0

    @property
    def is_idle(self) -> bool:
        """Whether there is no row at all."""
        return not self.waiting and len(self._free) == self.engine.slots

    def submit(self, row: Row) -> None:
        """Puts a row behind those that wait."""
        self.waiting.append(row)

    def step(self) -> list[Event]:
        """Writes one more token of every row that is written, or reads some of one prompt."""
        events = self._drop_cancelled()
        self._admit()
        table = self.table
        is_writing = bool(table.is_active.any())
        if not is_writing:
            self._budget = self.chunk
        if self.reading and self._budget > 0:
            size = self._read(min(self.reading, key=self._urgency), self._budget, events)
            self._budget, self._spent = self._budget - size, self._spent + size
        elif is_writing:
            self._widen(int(table.counts[table.is_active].max()))
            chosen = self.engine.step(table)
            table.held[table.is_active] += 1
            events += [self._take(s, chosen, s) for s in np.flatnonzero(table.is_active).tolist()]
            self._budget = self.chunk
        return events

    def warm_up(self) -> None:
        """Runs every program once, so that later none has to be compiled; before the first row."""
        table, engine = Table(self.engine.slots, self.table.ids.shape[1] - 1), self.engine
        table.counts[:] = 1
        for width in [*self._widths, *self._widths[-2::-1]] if engine.is_compiled else ():
            engine.resize(width)
            engine.step(table)
            engine.copy(0, engine.slots - 1, 1)
            for size in [chunk for chunk in self._chunks if chunk <= width]:
                for scores_prompt in (False, True):
                    engine.read(table, 0, 0, 1, size, scores_prompt)

    def _drop_cancelled(self) -> list[Event]:
        rows = [row for row in (*self.waiting, *self.rows) if row and row.is_cancelled]
        for row in rows:
            row.ended = row.ended or "cancelled"
            if row in self.waiting:
                self.waiting.remove(row)
            else:
                self._leave(self.rows.index(row))
        return [Event(row, None, None, row.ended) for row in rows]

    def _admit(self) -> None:
        """Gives rows that wait the slots that are free: one that holds their beginning, if any."""
        while self.waiting and self._free:
            row = self.waiting.popleft()
            common = [0 if row.scores_prompt else self._common(row, s) for s in self._free]
            best = max(common)
            slot = self._free[common.index(best) if best >= WORTHWHILE else 0]
            self._free.remove(slot)
            table, count = self.table, len(row.prompt)
            table.held[slot] = best if best >= WORTHWHILE else 0
            table.ids[slot, :count], table.counts[slot], table.made[slot] = row.prompt, count, 0
            table.is_scored[slot] = row.is_scored
            self.rows[slot] = row
            self.engine.place(slot, row.request)
            self.reading[slot] = self._spent

    def _common(self, row: Row, slot: int) -> int:
        """Tokens that a slot holds of the beginning of a row; its last one is always read."""
        count = min(int(self.table.held[slot]), len(row.prompt) - 1)
        is_equal = self.table.ids[slot, :count] == np.array(row.prompt[:count], np.int32)
        return count if is_equal.all() else int(is_equal.argmin())

    def _read(self, slot: int, budget: int, events: list[Event]) -> int:
        """Reads a chunk of a row; returns how many tokens' time it took.

        Args:
            slot: The row.
            budget: Most tokens to read, where no program has a number of its own.
            events: Where the row's first token is told.
        """
        table, row, engine = self.table, self.rows[slot], self.engine
        assert row is not None
        if not row.scores_prompt:
            self._copy_beginning(row, slot)
        count = int(table.counts[slot])
        left = count - int(table.held[slot])
        small, large = self._chunks
        is_long = left > large / 2 and budget >= large
        size = (large if is_long else small) if engine.is_compiled else min(left, budget)
        # The widest cache may have no room for a whole chunk there: then some is read once more.
        start = min(int(table.held[slot]), self._widths[-1] - size)
        end = min(start + size, count)
        self._widen(start + size)
        chosen, scores = engine.read(table, slot, start, end, size, row.scores_prompt)
        table.held[slot] = end
        if scores is not None:
            known = len(row.prompt_scores)
            found = [scores.at(i) for i in range(min(end, count - 1) - start)]
            row.prompt_scores += found[known - start :]
        if chosen is not None:
            del self.reading[slot]
            table.is_active[slot] = True
            events.append(self._take(slot, chosen, 0))
        return size

    def _urgency(self, slot: int) -> float:
        """Tokens left to read of a row, less a part of those read since; the least comes first."""
        left = int(self.table.counts[slot] - self.table.held[slot])
        return left - (self._spent - self.reading[slot]) / HASTE

    def _copy_beginning(self, row: Row, slot: int) -> None:
        """Copies what another slot holds of a row's beginning, where that is more than its own."""
        best = max(range(len(self.rows)), key=lambda other: self._common(row, other))
        count = self._common(row, best)
        if best != slot and count >= self.table.held[slot] + WORTHWHILE:
            self._widen(count)
            self.engine.copy(best, slot, count)
            self.table.held[slot] = count

    def _take(self, slot: int, chosen: Chosen, place: int) -> Event:
        """Gives a row the token that was chosen, and its slot away if that was the last."""
        table, row = self.table, self.rows[slot]
        assert row is not None
        try:
            check_logits(chosen.best[place : place + 1])
        except GenerationError as error:
            row.ended, row.error = "error", str(error).removeprefix("row 0: ")
            self._leave(slot)
            return Event(row, None, None, row.ended)
        token = int(chosen.tokens[place])
        row.push(token)
        table.ids[slot, table.counts[slot]] = token
        table.counts[slot] += 1
        table.made[slot] += 1
        if row.ended is not None:
            self._leave(slot)
        scores = chosen.scores.at(place) if row.is_scored else None
        return Event(row, token, scores, row.ended)

    def _leave(self, slot: int) -> None:
        """Gives a slot away; what it holds serves rows that begin in the same way."""
        self.reading.pop(slot, None)
        self.rows[slot], self.table.is_active[slot] = None, False
        self.table.is_scored[slot] = False
        self._free.append(slot)
        self._fit(slot)

    def _widen(self, needed: int) -> None:
        """Makes the caches as wide as is needed, narrower only after a while."""
        held = self.table.held[[row is not None for row in self.rows]]
        needed = max(needed, int(held.max(initial=0)) + 1)
        place = next(i for i, width in enumerate(self._widths) if width >= needed)
        now, is_compiled = self._widths.index(self.engine.width), self.engine.is_compiled
        self._calm = self._calm + 1 if place < now else 0
        # A program takes as long as its cache is wide; without one, width costs nothing but memory.
        has_time = self._calm > (PATIENCE if is_compiled else LONG_PATIENCE)
        steps = list(range(now + 1, place + 1)) or [now - 1] * has_time
        for i in steps if is_compiled else steps[-1:]:  # one at a time: few programs for all sizes
            self.engine.resize(self._widths[i])
            self._calm = 0
        for slot in self._free if steps else ():
            self._fit(slot)

    def _fit(self, slot: int) -> None:
        """Forgets of a free slot what is behind its last place: that takes what nobody reads."""
        self.table.held[slot] = min(self.table.held[slot], self.engine.width - 1)
