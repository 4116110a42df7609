"""Measures how long a cold process takes until it is of use, and prints one JSON line.

    python -m benchmarks.startup [--reps 5]

Medians of whole processes, in seconds, interpreter included.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

COMMANDS = {
    "python": ["-c", "pass"],
    "import_opt_core": ["-c", "import opt_core"],
    "opt_lm_help": ["-m", "opt_cli", "--help"],
    "import_opt_torch": ["-c", "import opt_torch"],
    "first_token": ["-m", "opt_cli", "generate", "ROMEO:", "--max-new-tokens", "1"],
}


def seconds(arguments: list[str]) -> float:
    """How long one process takes."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--reps", type=int, default=5)
    reps = parser.parse_args().reps
    medians = {
        name: round(statistics.median(seconds(arguments) for _ in range(reps)), 3)
        for name, arguments in COMMANDS.items()
    }
    print(json.dumps(medians))


if __name__ == "__main__":
    main()
