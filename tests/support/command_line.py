"""The `opt-lm` command: in this process, which saves importing a framework, or at a terminal."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fcntl import ioctl
from pathlib import Path
from struct import pack
from termios import TIOCSCTTY, TIOCSWINSZ
from typing import Any, NamedTuple

import pytest

from opt_cli.main import main

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "opt_cli"]
PATIENCE = 120.0


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


def _own_terminal() -> None:
    """Makes the terminal that of this process, Ctrl-C included."""
    ioctl(0, TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite in the background ignores it


class Terminal:
    """A command whose input and output are a terminal of some width."""

    def __init__(self, *arguments: object, columns: int = 80) -> None:
        self.end, terminal = pty.openpty()
        ioctl(terminal, TIOCSWINSZ, pack("HHHH", 30, columns, 0, 0))
        known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
        self.process = subprocess.Popen(
            [*COMMAND, *map(str, arguments)], cwd=ROOT, stdin=terminal, stdout=terminal,
            stderr=terminal, start_new_session=True, env=known | {"TERM": "xterm"},
            preexec_fn=_own_terminal,
        )  # fmt: skip
        os.close(terminal)
        self.shown = ""

    def until(self, text: str) -> str:
        """The text that is shown, once it has this in it, or to its end."""
        stop = time.monotonic() + PATIENCE
        while text not in self.shown:
            if time.monotonic() > stop:
                self.process.kill()
                raise AssertionError(f"no {text!r} in {PATIENCE} s: ...{self.shown[-500:]}")
            if select.select([self.end], [], [], 1.0)[0]:
                try:
                    self.shown += os.read(self.end, 4096).decode()
                except OSError:  # its last process has ended
                    break
        return self.shown

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def finish(self) -> tuple[int, str]:
        """The exit code, and all that was shown."""
        self.until("\0")
        return self.process.wait(PATIENCE), self.shown
