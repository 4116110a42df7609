"""Hundreds of small conversions: none of them has to outlive a power cut, few a hostile file."""

import os

import pytest

from conversion.formats import hdf5, hdf5_worker

HOSTILE = ("test_hostile", "test_fuzz", "test_atomic")
"""Where HDF5 files are read as they are outside of tests: in a process that may crash."""


@pytest.fixture(autouse=True)
def disk_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush takes longer than all the rest of a tiny conversion."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def hdf5_is_read_in_this_process(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process for each file takes longer than all the rest, too."""
    if request.module.__name__.rpartition(".")[2] not in HOSTILE:
        monkeypatch.setattr(hdf5_worker, "limit", lambda: None)
        monkeypatch.setattr(hdf5, "_listed", lambda path: hdf5_worker.main(path)["datasets"])
