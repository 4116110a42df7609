"""One process of several that run commands one after the other, as `opt-lm` each.

What ended each of them goes into a file, for the test to read, and how much of weights and data has
been read until then.
"""

import contextlib
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opt_cli.main import main
from tests.support.processes.counted_command import count_reads


def run(commands: list[list[str | list[str]]], rank: int) -> Iterator[tuple[int, str]]:
    """Runs each command; yields its exit code, and all that it wrote.

    Args:
        commands: Arguments of each; one that is a list has a value for each process.
        rank: Number of this process.
    """
    for command in commands:
        arguments = [value if isinstance(value, str) else value[rank] for value in command]
        told, code = io.StringIO(), 0
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            try:
                main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
        yield code, told.getvalue()


if __name__ == "__main__":
    home, number, given = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before PyTorch is loaded
    reads = count_reads("torch")
    if (own := home / f"host{number}").is_dir():  # a disk that the others do not see
        os.chdir(own)
    lines: list[Any] = []
    for code, told in run(given, number):
        lines.append(json.dumps([code, told, reads]))
        # At once: the process may be killed in the next one.
        (home / f"told{number}.jsonl").write_text("\n".join(lines))
