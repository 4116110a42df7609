"""A served model: its thread steps the scheduler, and hands news of rows to those who wait."""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from importlib import import_module
from typing import Any

from opt_cli.serving.errors import Refusal
from opt_cli.serving.metrics import Metrics
from opt_core.serving.row import Row
from opt_core.serving.scheduler import Event, Scheduler
from opt_core.text.tokenizer import OPTTokenizer


class Worker:
    """A model behind a thread of its own.

    Args:
        name: What requests call the model.
        model: A language model of any backend.
        tokenizer: Its tokenizer.
        backend: Name of its backend.
        slots: Rows that are written at a time.
        longest_queue: Most rows that may wait for a slot.
        metrics: Where figures are kept.
    """

    def __init__(
        self, name: str, model: Any, tokenizer: OPTTokenizer, backend: str, slots: int,
        longest_queue: int, metrics: Metrics,
    ) -> None:  # fmt: skip
        engine = import_module(f"opt_{backend}.serving.engine").Engine(model, slots)
        self.name, self.model, self.tokenizer, self.backend = name, model, tokenizer, backend
        self.scheduler, self.longest_queue, self.metrics = Scheduler(engine), longest_queue, metrics
        self.created, self.failure, self._rows = int(time.time()), "", 0
        self._arrived, self._feeds = deque[Row](), dict[Row, asyncio.Queue[Event]]()
        self._wake, self._is_closed = threading.Event(), False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name=f"model {name}", daemon=True)

    def start(self) -> None:
        """Begins to work for the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Ends the thread once its step is over."""
        self._is_closed = True
        self._wake.set()
        self._thread.join()

    @property
    def window(self) -> int:
        """Most tokens of a text."""
        return self.model.config.max_position_embeddings

    @property
    def waiting(self) -> int:
        """Rows that wait for a slot."""
        return max(0, self._rows - self.scheduler.engine.slots)

    def check_room(self, count: int) -> None:
        """Refuses rows that would have to wait behind too many.

        Raises:
            Refusal: There are too many, or the model failed.
        """
        if self.failure:
            raise Refusal(f"model {self.name} failed: {self.failure}", None, 503)
        if self._rows + count > self.scheduler.engine.slots + self.longest_queue:
            raise Refusal(
                f"{self.waiting} texts are waiting already, {self.longest_queue} may; try later",
                None, 429, "queue_full",
            )  # fmt: skip

    def enter(self, rows: Sequence[Row]) -> None:
        """Puts rows behind those that wait; `leave` must follow, whatever happens.

        Raises:
            Refusal: There is no room, or the model failed.
        """
        self.check_room(len(rows))
        feed = asyncio.Queue[Event]()
        for row in rows:
            self._feeds[row] = feed
        self._rows += len(rows)
        self._arrived.extend(rows)
        self._wake.set()

    def leave(self, rows: Sequence[Row]) -> None:
        """Forgets rows; those that have not ended end before the next step."""
        for row in rows:
            row.is_cancelled = True
            if self._feeds.pop(row, None) is not None:
                self._rows -= 1
        self._wake.set()

    async def events(self, rows: Sequence[Row]) -> AsyncGenerator[Event]:
        """News of rows that entered together, until all have ended."""
        began, feed = time.perf_counter(), self._feeds[rows[0]]
        open_rows, has_begun = set(rows), False
        while open_rows:
            event = await feed.get()
            if not has_begun and event.token is not None:
                has_begun = True
                self.metrics.first_token.labels(self.name).observe(time.perf_counter() - began)
            if event.ended is not None:
                open_rows.discard(event.row)
            yield event

    def cancel_all(self, reason: str) -> None:
        """Ends every row there is, as an error of this reason."""
        for row in list(self._feeds):
            row.error, row.is_cancelled = reason, True
        self._wake.set()

    def _run(self) -> None:
        scheduler = self.scheduler
        while not self._is_closed:
            if scheduler.is_idle and not self._arrived:
                self._wake.wait()
                self._wake.clear()
            while self._arrived:
                scheduler.submit(self._arrived.popleft())
            began = time.perf_counter()
            try:
                events = scheduler.step()
            except Exception as error:  # whatever a framework raises: nothing can go on
                self.failure = f"{type(error).__name__}: {error}".splitlines()[0]
                logging.getLogger(__name__).exception("model %s failed", self.name)
                self._tell(self._give_up)
                return
            self.metrics.note_step(self.name, scheduler, events, time.perf_counter() - began)
            if events:
                self._tell(self._deliver, events)

    def _tell(self, function: Any, *arguments: Any) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)

    def _deliver(self, events: list[Event]) -> None:
        for event in events:
            feed = self._feeds.get(event.row)
            if feed is not None:
                feed.put_nowait(event)

    def _give_up(self) -> None:
        for row, feed in self._feeds.items():
            row.ended, row.error = "error", self.failure
            feed.put_nowait(Event(row, None, None, row.ended))
