"""Which of several processes is gone, asked where one of them has lost its connection to another.

What a library says there names whom a process waited for, which may itself have waited for the one
that is gone. A process that waits, or computes, cannot answer a call: a thread of it does.
"""

import json
import threading
import time
from collections.abc import Callable
from typing import Self

from opt_core.errors import TrainingError

PATIENCE = 5.0
"""Seconds that processes have to say that they are there."""
_PAUSE = 0.5
_CALL, _VERDICT = "call", "gone"


class RollCall:
    """This process' part in finding out who is gone; as a context it answers the others' calls.

    Args:
        put: Keeps a text under a name where all processes find it, unless the name has one.
        get: The text under a name, or None.
        index: Number of this process.
        count: Number of processes.
    """

    def __init__(
        self,
        put: Callable[[str, str], None],
        get: Callable[[str], str | None],
        index: int,
        count: int,
    ) -> None:
        self._put, self._get, self._index, self._count = put, get, index, count
        self._gone: list[int] | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._answer, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def missing(self) -> list[int]:
        """The processes that do not answer; what the first that asks finds out holds for all.

        Where the place to ask at is gone too, it is the first process, which keeps it.
        """
        try:
            self._put(_CALL, "")
            deadline = time.monotonic() + PATIENCE
            while self._gone is None and (gone := self._silent("here", range(self._count))):
                if time.monotonic() > deadline:
                    self._put(_VERDICT, json.dumps(gone))
                    break
                time.sleep(0.1)
            else:  # all are there
                self._put(_VERDICT, "[]")
            gone = self._gone or json.loads(self._get(_VERDICT) or "[]")
            self._put(f"heard {self._index}", "")
            if self._index == 0:  # those that have not heard of it ask here
                left, deadline = [n for n in range(self._count) if n not in gone], deadline + 5
                while self._silent("heard", left) and time.monotonic() < deadline:
                    time.sleep(0.1)
            return gone
        except (OSError, RuntimeError):
            return self._gone or [0]

    def _silent(self, word: str, numbers: "range | list[int]") -> list[int]:
        return [n for n in numbers if self._get(f"{word} {n}") is None]

    def _answer(self) -> None:
        is_called = False
        while not self._done.wait(_PAUSE):
            try:
                if not is_called and self._get(_CALL) is not None:
                    is_called = True
                    self._put(f"here {self._index}", "")
                if is_called and (verdict := self._get(_VERDICT)) is not None:
                    self._gone = json.loads(verdict)
                    self._put(f"heard {self._index}", "")
                    return
            except (OSError, RuntimeError):
                return  # whoever kept it has ended


def loss(index: int, count: int, gone: list[int]) -> TrainingError:
    """The error of a process that knows who is gone.

    Args:
        index: Its number.
        count: Number of processes.
        gone: From `RollCall.missing`.
    """
    names = ", ".join(map(str, gone)) or "none, but one does not answer in time"
    return TrainingError(
        f"process {index} of {count}: lost connection, gone: process {names}; start all of them "
        "again with --resume"
    )
