"""Measures which share of the machine's read bandwidth decoding reaches, and prints one JSON line.

    python -m benchmarks.bandwidth --backend torch --model DIR

A decoded token reads every weight once. Reading a large array and decoding take turns, in one
process: a machine whose speed drifts then slows both. Figures, medians over the turns: `read_gb_s`,
the rate of reading alone; `decode_gb_s`, bytes of weights per second of decoding, the prompt's
time taken off; `share`, the ratio of these medians.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.compare import weights_read
from benchmarks.limits import READ_BYTES, best
from opt_cli.speed import BACKENDS, prompt, timed
from opt_core import OPTConfig

TRIES = 3
"""Readings in a turn; the fastest counts."""


def measure(backend: str, model: Path, turns: int, new: int) -> dict[str, Any]:
    """Takes turns at reading and decoding `new` tokens."""
    import torch

    config, block = OPTConfig.from_pretrained(model), torch.ones(READ_BYTES // 4)
    ids = prompt("decode", config, new + 1)
    work = BACKENDS[backend](model, "float32", ids)

    calls = [lambda count=count: work.generate(count, None) for count in (1, new + 1)]
    for call in calls:
        call()
    reading, decoding = [], []
    for _ in range(turns):
        reading.append(READ_BYTES / best(block.sum, TRIES) / 1e9)
        first, all_of_them = (timed(call) for call in calls)
        decoding.append(new * 4 * weights_read(config) / (all_of_them - first) / 1e9)
    read, decode = statistics.median(reading), statistics.median(decoding)
    return {
        "backend": backend, "model": model.name, "turns": turns, "read_gb_s": round(read, 1),
        "decode_gb_s": round(decode, 1), "share": round(decode / read, 3),
    }  # fmt: skip


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--new", type=int, default=16)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
