"""Hundreds of small conversions: none of them has to outlive a power cut."""

import os

import pytest


@pytest.fixture(autouse=True)
def disk_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flush takes longer than all the rest of a tiny conversion."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
