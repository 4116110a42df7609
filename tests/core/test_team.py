"""Processes that work together, threads in their place: a failure of one is everyone's."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from opt_core.errors import CheckpointError, TrainingError
from opt_core.team import Team


class Threads(Team):
    """One of several threads."""

    def __init__(self, index: int, room: list[Any], barrier: threading.Barrier):
        self.index, self.count, self.room, self.barrier = index, len(room), room, barrier

    def gather(self, value: Any) -> list[Any]:
        self.room[self.index] = value
        self.barrier.wait(10)
        found = list(self.room)
        self.barrier.wait(10)
        return found


def run(act: Any, count: int = 3) -> list[Any]:
    """The result, or the error, of each of some threads."""
    room, barrier = [None] * count, threading.Barrier(count)

    def one(index: int) -> Any:
        try:
            return act(Threads(index, room, barrier))
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def fail_at(index: int, team: Team) -> int:
    if team.index == index:
        raise CheckpointError(f"the disk of process {index} is full")
    return team.index


def test_a_failure_is_everyones():
    assert run(lambda team: team.together(lambda: fail_at(9, team))) == [0, 1, 2]
    told = "CheckpointError: the disk of process 2 is full"
    assert run(lambda team: team.together(lambda: fail_at(2, team))) == [told] * 3


def test_the_first_process_acts_for_all():
    acted: list[int] = []
    found = run(lambda team: team.first(lambda: acted.append(team.index) or "done"))
    assert found == ["done"] * 3
    assert acted == [0]
    told = "CheckpointError: the disk of process 0 is full"
    assert run(lambda team: team.first(lambda: fail_at(0, team))) == [told] * 3


def test_processes_that_differ_are_told_how():
    assert run(lambda team: team.check_same("data", 7)) == [None] * 3
    found = run(lambda team: team.check_same("data", 7 + (team.index == 1)))
    assert found == [found[0]] * 3
    assert "data: process 0 has 7, process 1 has 8; start all with the same" in found[0]
    values = {"a": 1, "b": {"c": 2, "d": 3}}
    found = run(lambda team: team.check_same("set", values | {"b": {"c": team.index, "d": 3}}))
    assert "set: process 0 has b=c=0, process 1 has b=c=1; start all" in found[0]


def test_a_process_alone_asks_nobody():
    team = Team()
    assert team.is_first
    assert team.first(lambda: 3) == team.together(lambda: 3) == 3
    team.check_same("data", object())
    with pytest.raises(TrainingError):
        team.together(lambda: (_ for _ in ()).throw(TrainingError("no")).__next__())
