"""Measures decoding with a model larger than memory beside the rate of its disk; one JSON line.

    python -m benchmarks.offload /big/disk/opt-2.7b --preset opt-2.7b --cgroup DIR [--save]

The folder is made if it is missing: float16, random weights. Once PyTorch is imported, the process
joins a control group of Linux whose limit is the bytes of the weights divided by `--larger`; their
pages in the system's memory count there. DIR is the folder of one that this user may change, as in
/sys/fs/cgroup; without it there is no limit, and nothing is kept.

Reading the file from its start to its end, past the system's memory and with several blocks under
way, and steps of one row and of `--rows` rows take turns. `disk_gb_s` is the rate of reading;
`step_s` the median seconds of a step; `model_gb_s` the bytes of the weights per second of it;
`share` of the disk's rate; `step_of_rows` how many steps of one row a step of several takes. First
with nothing kept in memory between the steps ("streamed"), then with what fits ("kept").
"""

import argparse
import json
import mmap
import os
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.convert_memory import forget, make_source
from opt_core.config import OPTConfig

_BLOCK = 8 << 20
_UNDER_WAY = 4
_LIMITS = ("memory.max", "memory.limit_in_bytes")
_RESULTS = Path(__file__).parent / "results" / "offload.json"


def read_rate(files: list[Path]) -> float:
    """Bytes per second of reading files in order, several blocks under way, past the cache."""
    done, start = 0, time.perf_counter()
    for path in files:
        handle, size = os.open(path, os.O_RDONLY | os.O_DIRECT), path.stat().st_size
        local = threading.local()

        def read(offset: int, handle: int = handle, local: threading.local = local) -> int:
            if not hasattr(local, "block"):
                local.block = mmap.mmap(-1, _BLOCK)
            return os.preadv(handle, [local.block], offset)

        with ThreadPoolExecutor(_UNDER_WAY) as pool:
            done += sum(pool.map(read, range(0, size, _BLOCK)))
        os.close(handle)
    return done / (time.perf_counter() - start)


def join(group: Path, nbytes: int) -> None:
    """Puts this process into a control group, made if it is missing, with a limit of its own."""
    group.mkdir(exist_ok=True)
    limit = next(name for name in _LIMITS if (group / name).exists())
    (group / limit).write_text(str(nbytes))
    (group / "cgroup.procs").write_text(str(os.getpid()))


def seconds_of_steps(model: Any, rows: int, new: int) -> list[float]:
    """How long each step after the prompt takes."""
    ids = np.random.default_rng(0).integers(4, model.config.vocab_size, (rows, 8))
    seconds: list[float] = []
    last = None
    for _ in model.stream(ids, max_new_tokens=new + 1, eos_token_id=None):
        now = time.perf_counter()
        seconds += [] if last is None else [now - last]
        last = now
    return seconds


def measure(folder: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result without, one with parts that are kept."""
    import torch

    import opt_torch.checkpoint
    from opt_torch import OPTForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    files = sorted(folder.glob("*.safetensors"))
    size = forget(folder)
    if args.cgroup is not None:
        join(args.cgroup, int(size / args.larger))
    available = opt_torch.checkpoint.available_memory
    for mode in ("streamed", "kept") if args.cgroup is not None else ("streamed",):
        none = lambda: 0.0  # noqa: E731
        opt_torch.checkpoint.available_memory = none if mode == "streamed" else available
        model = OPTForCausalLM.from_pretrained(folder, dtype=args.dtype, offload="auto")
        disk: list[float] = []
        steps: dict[int, list[float]] = {1: [], args.rows: []}
        seconds_of_steps(model, 1, 1)  # what is kept comes in
        for _ in range(args.turns):
            disk.append(read_rate(files) / 1e9)
            for rows, seconds in steps.items():
                seconds += seconds_of_steps(model, rows, args.new)
        one, many = (statistics.median(seconds) for seconds in steps.values())
        rate = statistics.median(disk)
        yield {
            "model": args.preset, "mode": mode, "stored": "float16", "dtype": args.dtype,
            "weights_gb": round(size / 1e9, 2),
            "memory_gb": None if args.cgroup is None else round(size / args.larger / 1e9, 2),
            "disk_gb_s": round(rate, 2), "step_s": round(one, 2),
            "model_gb_s": round(size / one / 1e9, 2), "share": round(size / one / 1e9 / rate, 2),
            "rows": args.rows, "step_of_rows": round(many / one, 2),
        }  # fmt: skip
        del model


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--preset", default="opt-2.7b")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--larger", type=float, default=1.5)
    parser.add_argument("--cgroup", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--new", type=int, default=3)
    parser.add_argument("--save", action="store_true")
    args = parser.parse_args()
    if not args.folder.exists():
        make_source(args.folder, OPTConfig.from_preset(args.preset), "5GB")
    results: list[dict[str, Any]] = []
    for result in measure(args.folder, args):
        print(json.dumps(result), flush=True)
        results.append(result)
        if args.save:
            _RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
