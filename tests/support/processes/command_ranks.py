"""One process of several that run commands one after the other, as `opt-lm` each.

What ended each of them goes into a file, for the test to read.
"""

import contextlib
import io
import json
import os
import sys
from pathlib import Path

from opt_cli.main import main


def run(commands: list[list[str | list[str]]], rank: int) -> list[tuple[int, str]]:
    """The exit code of each command, and all that it wrote.

    Args:
        commands: Arguments of each; one that is a list has a value for each process.
        rank: Number of this process.
    """
    found: list[tuple[int, str]] = []
    for command in commands:
        arguments = [value if isinstance(value, str) else value[rank] for value in command]
        told, code = io.StringIO(), 0
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            try:
                main(arguments)
            except SystemExit as end:
                code = int(end.code or 0)
        found.append((code, told.getvalue()))
    return found


if __name__ == "__main__":
    home, number, given = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    if (own := home / f"host{number}").is_dir():  # a disk that the others do not see
        os.chdir(own)
    (home / f"told{number}.json").write_text(json.dumps(run(given, number)))
