"""Kills a training run with SIGKILL at random moments, many times, and looks for a trace.

    python -m benchmarks.kill_run --text tinyshakespeare.txt [--backend tf] [--kills 10]

Fine-tunes the embedded model, dropout on, once in peace and once killed and resumed; prints one
JSON line per backend: the steps at which the kills fell, and how far final weights and losses are
apart.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from conversion.backends import BACKENDS
from opt_core.checkpoints import read_safetensors
from opt_core.training import read_metrics
from opt_core.training.run_folder import MODEL_FOLDER

STEPS = 80
OPTIONS = (
    "--max-steps", STEPS, "--save-every", 2, "--eval-every", 20, "--eval-batches", 4,
    "--batch-size", 4, "--sequence-length", 64, "--learning-rate", 1e-3, "--keep-checkpoints", 1,
)  # fmt: skip


def command(text: Path, out: Path, backend: str) -> list[str]:
    """The command line of the run."""
    options = (*OPTIONS, "--validation", text, "--out", out, "--backend", backend, "--resume")
    return [sys.executable, "-m", "opt_cli", "train", "mini", str(text), *map(str, options)]


def life(arguments: list[str], out: Path, moments: random.Random) -> int | None:
    """Starts or resumes a run and kills it; the last step seen, or None where it came to an end.

    The moment is some steps after the last one seen before, and up to a fifth of a second: while a
    step is computed, a checkpoint is written, or an older one removed.
    """
    before, start = last_step(out), time.time()
    wanted = before + moments.randint(1, 8)
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and not (is_newer(out, start) and last_step(out) >= wanted):
        time.sleep(0.002)
    time.sleep(moments.uniform(0, 0.2))
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    if process.returncode == 0:
        return None
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(errors.decode())
    return last_step(out)


def to_the_end(arguments: list[str]) -> None:
    """Starts or resumes a run and lets it finish."""
    done = subprocess.run(arguments, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)


def last_step(out: Path) -> int:
    """The last step in a run's metrics."""
    records = read_metrics(out)
    return records[-1]["step"] if records else 0


def is_newer(out: Path, start: float) -> bool:
    """Whether this process has written metrics, not one before it."""
    path = out / "metrics.jsonl"
    return path.exists() and path.stat().st_mtime > start


def compare(one: Path, other: Path) -> dict[str, float]:
    """The largest differences of two runs."""
    ours, theirs = (read_safetensors(p / MODEL_FOLDER / "model.safetensors") for p in (one, other))
    assert ours.keys() == theirs.keys()
    weights = [abs(ours[name].read() - theirs[name].read()).max() for name in ours]
    losses = [
        [r.get("loss", r.get("eval_loss")) for r in read_metrics(path)] for path in (one, other)
    ]
    apart = [abs(a / b - 1) for a, b in zip(*losses, strict=True)]
    return {"weights_apart": float(max(weights)), "losses_apart": max(apart)}


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for backend in args.backend or BACKENDS:
        moments = random.Random(args.seed)
        with tempfile.TemporaryDirectory() as folder:
            peace, killed = Path(folder, "peace"), Path(folder, "killed")
            to_the_end(command(args.text, peace, backend))
            steps: list[Any] = []
            while len(steps) < args.kills:
                steps.append(life(command(args.text, killed, backend), killed, moments))
                if steps[-1] is None:
                    raise RuntimeError(f"the run ended after {len(steps) - 1} kills; try a --seed")
            to_the_end(command(args.text, killed, backend))
            found = {"backend": backend, "steps": STEPS, "killed_at": steps}
            print(json.dumps(found | compare(killed, peace)), flush=True)


if __name__ == "__main__":
    main()
