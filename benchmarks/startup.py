"""Measures how long a cold process takes until it is of use, and prints one JSON line.

    python -m benchmarks.startup [--reps 5]

Medians of whole processes, in seconds, interpreter included. `first_token_*`: one token of the
embedded model; with `_again`, after a process that left its compiled programs on disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from conversion.backends import BACKENDS

COMMANDS = {
    "python": ["-c", "pass"],
    "import_opt_core": ["-c", "import opt_core"],
    "opt_lm_help": ["-m", "opt_cli", "--help"],
    "import_opt_torch": ["-c", "import opt_torch"],
}
FIRST_TOKEN = ["-m", "opt_cli", "generate", "ROMEO:", "--max-new-tokens", "1", "--backend"]


def seconds(arguments: list[str], cache: str | None = None) -> float:
    """How long one process takes; `cache`: where it finds, and leaves, compiled programs."""
    kept = {} if cache is None else {"XDG_CACHE_HOME": cache}
    start = time.perf_counter()
    command = [sys.executable, *arguments]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | kept)
    return time.perf_counter() - start


def first_tokens(backend: str, reps: int) -> tuple[list[float], list[float]]:
    """Seconds of processes that compile, and of those after them."""
    first, again = [], []
    for _ in range(reps):
        with tempfile.TemporaryDirectory() as cache:
            first.append(seconds([*FIRST_TOKEN, backend], cache))
            again.append(seconds([*FIRST_TOKEN, backend], cache))
    return first, again


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reps", type=int, default=5)
    reps = parser.parse_args().reps
    medians = {
        name: round(statistics.median(seconds(arguments) for _ in range(reps)), 3)
        for name, arguments in COMMANDS.items()
    }
    for backend in BACKENDS:
        for name, times in zip(("", "_again"), first_tokens(backend, reps), strict=True):
            medians[f"first_token_{backend}{name}"] = round(statistics.median(times), 3)
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
