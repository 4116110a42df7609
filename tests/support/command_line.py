"""The `opt-lm` command run in this process, which saves importing a framework each time."""

import io
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from opt_cli.main import main


class Outcome(NamedTuple):
    """A command's end: its exit code and what it wrote."""

    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


def make_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The function behind the fixture `opt_lm`."""

    def run(*arguments: Any, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return run
