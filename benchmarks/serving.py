"""Times requests of mixed lengths, several at a time by the serving engine and one by one.

python -m benchmarks.serving --model opt-125m --backend torch --requests 200

Each request has 8 to 400 tokens of prompt and 8 to 128 new ones, greedy and sampled in turn. One
JSON line says how many tokens per second there are in all, together and one at a time, when the
first tokens come, and how many texts differ from those that `generate` writes alone. A preset's
name stands for a model of that shape with random weights. The two ways take turns, so that what
else the machine does meanwhile harms both; `cpu_ratio` compares the processor's time instead of the
clock's, which is fair on a busy machine where there is one thread (OMP_NUM_THREADS=1).
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import numpy as np

from opt_cli.backends import load_backend
from opt_core import OPTConfig
from opt_core.generation.mixin import make_request
from opt_core.presets import PRESETS
from opt_core.serving.row import Row
from opt_core.serving.scheduler import Scheduler

PROMPTS, NEW = (8, 400), (8, 128)
"""Fewest and most tokens."""


def load(model: str, backend: str, dtype: str) -> Any:
    """A model of a folder or hub id, or one of a preset's shape."""
    made = load_backend(backend)
    if model in PRESETS:
        return made(OPTConfig.from_preset(model), seed=0)
    return made.from_pretrained(model, dtype=dtype)


def calls(model: Any, count: int) -> list[dict[str, Any]]:
    """Arguments of `generate` for each request."""
    source, found = random.Random(0), list[dict[str, Any]]()
    for i in range(count):
        prompt = [
            source.randrange(4, model.config.vocab_size) for _ in range(source.randint(*PROMPTS))
        ]
        found.append(
            {"input_ids": [prompt], "max_new_tokens": source.randint(*NEW), "seed": i,
             "do_sample": i % 2 == 1, "top_k": 50, "eos_token_id": None}
        )  # fmt: skip
    return found


class Seconds:
    """Seconds of the clock and of the processor, in all."""

    def __init__(self) -> None:
        self.clock = self.processor = 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Adds those of a block."""
        began = time.perf_counter(), time.process_time()
        yield
        self.clock += time.perf_counter() - began[0]
        self.processor += time.process_time() - began[1]


def together(scheduler: Scheduler, rows: list[Row]) -> list[float]:
    """All requests, as many at a time as there are slots; seconds to their first tokens."""
    first, waiting, starts, open_rows = list[float](), list(rows), dict[Row, float](), 0
    while waiting or open_rows:
        while waiting and open_rows < scheduler.engine.slots:
            row = waiting.pop(0)
            starts[row], open_rows = time.perf_counter(), open_rows + 1
            scheduler.submit(row)
        for event in scheduler.step():
            if len(event.row.made) == 1:
                first.append(time.perf_counter() - starts[event.row])
            open_rows -= event.ended is not None
    return first


def alone(model: Any, every: list[dict[str, Any]]) -> list[list[int]]:
    """The texts of all requests, one after the other."""
    texts: list[list[int]] = []
    for call in every:
        ids = np.asarray(model.generate(**call))[0]
        texts.append(ids[len(call["input_ids"][0]) :].tolist())
    return texts


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("torch", "tf", "flax"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--turns", type=int, default=2)
    options = parser.parse_args()
    model = load(options.model, options.backend, options.dtype)
    engine = import_module(f"opt_{options.backend}.serving.engine").Engine(model, options.slots)
    scheduler, began = Scheduler(engine), time.perf_counter()
    scheduler.warm_up()
    warm, every = time.perf_counter() - began, calls(model, options.requests)
    batched, single, first, differing, count = Seconds(), Seconds(), list[float](), 0, 0
    for turn in range(options.turns):
        part = every[turn :: options.turns]
        rows = [Row(make_request(model, **call)) for call in part]
        with batched.counted():
            first += together(scheduler, rows)
        if engine.is_compiled:
            alone(model, part)  # every program is made now
        with single.counted():
            texts = alone(model, part)
        differing += sum(row.made != text for row, text in zip(rows, texts, strict=True))
        count += sum(map(len, texts))
    first.sort()
    figures = {
        **vars(options), "tokens": count, "tok_s": round(count / batched.clock, 1),
        "alone_tok_s": round(count / single.clock, 1),
        "ratio": round(single.clock / batched.clock, 2),
        "cpu_ratio": round(single.processor / batched.processor, 2),
        "warm_s": round(warm, 1), "first_s": round(statistics.median(first), 3),
        "first_p95_s": round(first[int(0.95 * len(first))], 3), "differing": differing,
    }  # fmt: skip
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
