"""Prefetches the next tensor while the last one is in use: disk and processor both work."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Results of tasks, of which the one after the last taken is already being worked on.

    No result but that one is kept: whoever takes them in another order waits for each.

    Args:
        tasks: Functions, called in a thread of their own, one at a time.
    """

    def __init__(self, tasks: Sequence[Callable[[], T]]) -> None:
        self._tasks = tasks
        self._started: dict[int, Future[T]] = {}
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def take(self, index: int) -> T:
        """The result of a task; what the task raised is raised here."""
        if index not in self._started:
            for future in self._started.values():
                future.cancel()
            self._started.clear()  # or what nobody takes in time would pile up
        self._start(index)
        result = self._started.pop(index).result()
        if index + 1 < len(self._tasks):
            self._start(index + 1)
        return result

    def _start(self, index: int) -> None:
        if index not in self._started:
            self._started[index] = self._pool.submit(self._tasks[index])
