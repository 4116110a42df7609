"""Kills the processes of a training run on a mesh, resumes it, and looks for a trace.

    python -m benchmarks.kill_mesh --text tinyshakespeare.txt [--backend flax] [--steps 200]

Fine-tunes a model, by default the embedded one, on four processes, as data=2,fsdp=2, once in
peace; once killed twice, first one process in the middle of a step, then all, resumed on the same
mesh and then on another; and, in PyTorch, once under torchrun, which starts all again by itself.
Prints one JSON line for each backend: how long the others outlived the one that was killed, what
they said, and how far losses are apart from those of the run in peace.
"""

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opt_core.training import read_metrics

RANKS = 4
MESH, OTHER = "data=2,fsdp=2", "fsdp=2,model=2"
VICTIM = 2
"""The process that is killed alone: not the first, at which the others meet."""
OPTIONS = (
    "--save-every", 10, "--batch-size", 4, "--sequence-length", 32, "--learning-rate", 1e-4,
    "--keep-checkpoints", 1, "--dropout", 0, "--attention-dropout", 0, "--resume",
)  # fmt: skip
Processes = list[subprocess.Popen[str]]


def command(model: str, text: Path, out: Path, backend: str, steps: int, mesh: str) -> list[str]:
    """The arguments of the run, after Python's own."""
    options = (*OPTIONS, "--max-steps", steps, "--out", out, "--backend", backend, "--mesh", mesh)
    return ["-m", "opt_cli", "train", model, str(text), *map(str, options)]


def start(arguments: list[str], backend: str) -> Processes:
    """Starts the processes of a run, which find one another at a free port."""
    port, common = _free_port(), {**os.environ, "OMP_NUM_THREADS": "1"}
    processes: Processes = []
    for rank in range(RANKS):
        own, environment = [*arguments], dict(common)
        if backend == "flax":
            own += ["--coordinator", f"127.0.0.1:{port}", "--process", f"{rank}/{RANKS}"]
        else:
            environment |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            }  # fmt: skip
        processes.append(_start([sys.executable, *own], environment))
    return processes


def to_the_end(arguments: list[str], backend: str) -> None:
    """Starts or resumes a run and lets it finish."""
    processes = start(arguments, backend)
    told = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(told))


def killed(arguments: list[str], backend: str, out: Path, at: int, victims: list[int]) -> Any:
    """Starts or resumes a run, kills some of its processes in the step after `at`, waits for all.

    Returns:
        The last step seen, the seconds until all were gone, exit codes, and each one's last line.
    """
    processes = start(arguments, backend)
    _wait(lambda: last_step(out) >= at, processes)
    time.sleep(random.Random(at).uniform(0, 0.1))  # into the step
    for victim in victims:
        processes[victim].send_signal(signal.SIGKILL)
    since = time.monotonic()
    told = [process.communicate()[0] for process in processes]
    lines = [text.strip().splitlines()[-1:] for text in told]
    return {
        "step": last_step(out),
        "gone_after": round(time.monotonic() - since, 1),
        "codes": [process.returncode for process in processes],
        "said": [line for rank, (line,) in _spoken(lines) if rank not in victims],
    }


def restarted(arguments: list[str], out: Path, at: int) -> dict[str, Any]:
    """The same under torchrun, which is to start all again when one of them was killed."""
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS), "--max-restarts"]
    options = [*torchrun, "1", "--master-port", str(_free_port())]
    process = _start([sys.executable, *options, *arguments], {**os.environ, "OMP_NUM_THREADS": "1"})
    _wait(lambda: last_step(out) >= at, [process])
    os.kill(_children(process.pid)[VICTIM], signal.SIGKILL)
    since, before = time.monotonic(), last_step(out)
    _wait(lambda: last_step(out) < before, [process])  # metrics go back to the checkpoint
    _wait(lambda: last_step(out) > before, [process])
    caught_up = round(time.monotonic() - since, 1)
    told, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(told)
    return {"step": before, "caught_up_after": caught_up, "code": process.returncode}


def last_step(out: Path) -> int:
    """The last step in a run's metrics."""
    records = read_metrics(out)
    return records[-1]["step"] if records else 0


def apart(one: Path, other: Path) -> float:
    """The largest difference of two runs' losses, step by step."""
    ours, theirs = ([(r["step"], r["loss"]) for r in read_metrics(path)] for path in (one, other))
    assert [step for step, _ in ours] == [step for step, _ in theirs]
    return max(abs(a - b) for (_, a), (_, b) in zip(ours, theirs, strict=True))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def _wait(until: Callable[[], bool], processes: Processes) -> None:
    while not until():
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("\n".join(process.communicate()[0] for process in processes))
        time.sleep(0.01)


def _spoken(lines: list[list[str]]) -> list[tuple[int, list[str]]]:
    return [(rank, line) for rank, line in enumerate(lines) if line]


def _children(parent: int) -> list[int]:
    """Processes that another one started, oldest first."""
    tasks = Path(f"/proc/{parent}/task").iterdir()
    return sorted(int(pid) for task in tasks for pid in (task / "children").read_text().split())


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--backend", choices=("torch", "flax"), action="append")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    for backend in args.backend or ("torch", "flax"):
        with tempfile.TemporaryDirectory() as folder:
            peace, broken, again = (Path(folder, name) for name in ("peace", "broken", "again"))
            to_the_end(command(args.model, args.text, peace, backend, args.steps, MESH), backend)
            found: dict[str, Any] = {"backend": backend, "steps": args.steps}
            same = command(args.model, args.text, broken, backend, args.steps, MESH)
            third = args.steps // 3
            found["one"] = killed(same, backend, broken, third, [VICTIM])
            found["all"] = killed(same, backend, broken, 2 * third, list(range(RANKS)))
            to_the_end(command(args.model, args.text, broken, backend, args.steps, OTHER), backend)
            found["losses_apart"] = apart(broken, peace)
            if backend == "torch":
                same = command(args.model, args.text, again, backend, args.steps, MESH)
                found["torchrun"] = restarted(same, again, third)
                found["torchrun"]["losses_apart"] = apart(again, peace)
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
