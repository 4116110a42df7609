"""How much faster two processes train than one: rows per second, one thread each.

    python -m benchmarks.scaling [--model opt-125m] [--rows 4] [--length 256]

Trains the model's shape from random weights with PyTorch, first as one process, then as data=2 with
as many rows for each; prints one JSON line.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import time

import numpy as np

STEPS = 3
"""Steps that are timed, after one that is not."""


def train(model: str, rows: int, length: int) -> float:
    """Rows per second of this process' mesh, which its environment says."""
    import torch

    from opt_core import OPTConfig, TrainConfig
    from opt_torch import OPTForCausalLM, sharding
    from opt_torch.training import make_optimizer, train_step

    torch.set_num_threads(1)
    count = int(os.environ.get("WORLD_SIZE", "1"))
    mesh = sharding.make_mesh(data=count)
    config = OPTConfig.from_preset(model)
    made = OPTForCausalLM(config, seed=0, mesh=mesh if count > 1 else None).train()
    settings = TrainConfig(max_steps=STEPS + 1, batch_size=rows * count)
    optimizer = make_optimizer(made, settings)
    ids = np.random.default_rng(0).integers(4, config.vocab_size, (rows * count, length))
    start = 0.0
    for step in range(STEPS + 1):
        if step == 1:
            start = time.monotonic()
        train_step(made, optimizer, ids, settings, step)
    return rows * count * STEPS / (time.monotonic() - start)


def run(count: int, arguments: list[str]) -> float:
    """The rows per second of some processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.scaling", "--inside", *arguments],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, text=True,
        ) for rank in range(count)
    ]  # fmt: skip
    told = [process.communicate()[0] for process in processes]
    return float(told[0])


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="opt-125m")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--inside", action="store_true", help="be one of the processes")
    args = parser.parse_args()
    if args.inside:
        print(train(args.model, args.rows, args.length))
        return
    given = ["--model", args.model, "--rows", str(args.rows), "--length", str(args.length)]
    one, two = (run(count, given) for count in (1, 2))
    found = {"model": args.model, "rows": args.rows, "length": args.length}
    print(json.dumps(found | {"one": one, "two": two, "ratio": two / one}))


if __name__ == "__main__":
    main()
