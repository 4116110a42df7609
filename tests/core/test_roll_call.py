"""Processes, threads in their place, find out which of them is gone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import pytest

from opt_core import roll_call
from opt_core.roll_call import RollCall, loss


class Board:
    """Where texts are kept, until its keeper goes."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.lock, self.is_open = threading.Lock(), True

    def put(self, name: str, text: str) -> None:
        self.get(name)
        with self.lock:
            self.texts.setdefault(name, text)

    def get(self, name: str) -> str | None:
        if not self.is_open:
            raise ConnectionResetError("closed")
        return self.texts.get(name)


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    monkeypatch.setattr(roll_call, "PATIENCE", 0.4)
    monkeypatch.setattr(roll_call, "_PAUSE", 0.02)
    return Board()


def calls_of(board: Board, present: list[int], stack: ExitStack) -> dict[int, RollCall]:
    """Four processes, of which only some are there."""
    return {n: stack.enter_context(RollCall(board.put, board.get, n, 4)) for n in present}


def test_who_waits_is_there_and_who_is_gone_is_not(board: Board):
    with ExitStack() as stack:
        calls = calls_of(board, [0, 1, 3], stack)
        with ThreadPoolExecutor() as pool:  # 1 waits for somebody, its thread answers
            found = list(pool.map(lambda n: calls[n].missing(), (0, 3)))
        assert found == [[2], [2]]
        board.is_open = False  # the first process has ended
        assert calls[1].missing() == [2]


def test_the_keeper_is_gone(board: Board):
    with ExitStack() as stack:
        calls = calls_of(board, [1, 2, 3], stack)
        board.is_open = False
        assert calls[2].missing() == [0]


def test_nobody_is_gone(board: Board):
    with ExitStack() as stack:
        assert calls_of(board, [0, 1, 2, 3], stack)[2].missing() == []
    assert "gone: process none, but one does not answer" in str(loss(2, 4, []))
    assert "process 2 of 4: lost connection, gone: process 1, 3; start" in str(loss(2, 4, [1, 3]))
