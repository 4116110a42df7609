"""Times requests of mixed lengths, several at a time by the serving engine and one by one.

python -m benchmarks.serving --model opt-125m --backend torch --requests 200

Each request has 8 to 400 tokens of prompt and 8 to 128 new ones, greedy and sampled in turn. One
JSON line says how many tokens per second there are in all, together and one at a time, when the
first tokens come, and how many texts differ from those that `generate` writes alone. A preset's
name stands for a model of that shape with random weights.

    first_p95_s     time to first token, 95th percentile
    idle_first_s    the same on an idle server, median: nobody else is served
    wait_p95        how much later a first token comes than on an idle server, its own prompt's time
                    taken off, in such medians: 95th percentile
    cpu_wait_p95    the same in the processor's time
    compilations    programs that were made after the warm-up

With --alone fewer requests are also written one at a time, spread evenly over all; `ratio` then
compares seconds per request. `cpu_ratio` compares the processor's time instead of the clock's,
which is fair on a busy machine where there is one thread (OMP_NUM_THREADS=1). With --peer DIR all
requests are greedy, and CTranslate2 writes them too, in float32, by batches of as many, with as
many threads as OMP_NUM_THREADS says; DIR is what its converter made of the model. It reads prompts
token by token from the end of a batch's shortest on: requests are sorted by their prompts' lengths
for it, which no server could do. `peer_ratio` is our speed by its.
"""

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
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


def now() -> np.ndarray:
    """Seconds of the clock and of the processor."""
    return np.array([time.perf_counter(), time.process_time()])


def together(scheduler: Scheduler, rows: list[Row]) -> np.ndarray:
    """All requests, as many at a time as there are slots; (R, 2) seconds to their first tokens."""
    first, waiting, starts, open_rows = dict[Row, Any](), list(rows), dict[Row, Any](), 0
    while waiting or open_rows:
        while waiting and open_rows < scheduler.engine.slots:
            row = waiting.pop(0)
            starts[row], open_rows = now(), open_rows + 1
            scheduler.submit(row)
        for event in scheduler.step():
            if len(event.row.made) == 1:
                first[event.row] = now() - starts[event.row]
            open_rows -= event.ended is not None
    return np.stack([first[row] for row in rows])


def idle_first(model: Any, scheduler: Scheduler, every: list[dict[str, Any]]) -> np.ndarray:
    """The same where there is no other."""
    found: list[np.ndarray] = []
    for call in every:
        scheduler.table.held[:] = 0  # nothing is known of its beginning
        row = Row(make_request(model, **{**call, "max_new_tokens": 1}))
        found.append(together(scheduler, [row])[0])
    return np.stack(found)


def programs(model: Any, backend: str) -> int:
    """How many programs of serving were compiled."""
    if backend == "torch":
        return 0
    if backend == "tf":
        return sum(p.experimental_get_tracing_count() for p in model.programs.values())
    engine = import_module("opt_flax.serving.engine")
    names = ("_step", "_read", "_score", "_copy", "_resize", "_row", "_choose")
    return sum(getattr(engine, name)._cache_size() for name in names)


def alone(model: Any, every: list[dict[str, Any]]) -> list[list[int]]:
    """The texts of all requests, one after the other."""
    texts: list[list[int]] = []
    for call in every:
        ids = np.asarray(model.generate(**call))[0]
        texts.append(ids[len(call["input_ids"][0]) :].tolist())
    return texts


def peer_batch(
    folder: Path, every: list[dict[str, Any]], slots: int
) -> tuple[Seconds, list[list[int]]]:
    """Seconds and texts of CTranslate2, by batches: a row ends where its request does."""
    import ctranslate2  # pyright: ignore[reportMissingImports]  # of another environment

    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    generator = ctranslate2.Generator(
        str(folder), device="cpu", compute_type="float32", intra_threads=threads
    )
    words = json.loads((folder / "vocabulary.json").read_text())
    texts, taken = dict[int, list[int]](), Seconds()
    order = sorted(range(len(every)), key=lambda i: len(every[i]["input_ids"][0]))
    for start in range(0, len(every), slots):
        batch = [every[i] for i in order[start : start + slots]]
        new, lengths = zip(
            *((c["max_new_tokens"], len(c["input_ids"][0])) for c in batch), strict=True
        )
        # It counts steps from the end of the shortest prompt.
        last = [
            length - min(lengths) + count - 1 for length, count in zip(lengths, new, strict=True)
        ]
        with taken.counted():
            found = generator.generate_batch(
                [[words[i] for i in call["input_ids"][0]] for call in batch],
                max_length=max(new), beam_size=1, include_prompt_in_result=False, end_token=[],
                callback=partial(lambda last, step: step.step >= last[step.batch_id], last),
            )  # fmt: skip
        texts |= {
            i: row.sequences_ids[0]
            for i, row in zip(order[start : start + slots], found, strict=True)
        }
    return taken, [texts[i] for i in range(len(every))]


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=("torch", "tf", "flax"), required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--alone", type=int, help="default: all")
    parser.add_argument("--slots", type=int, default=16)
    parser.add_argument("--peer", type=Path, help="what CTranslate2's converter wrote")
    options = parser.parse_args()
    model = load(options.model, options.backend, options.dtype)
    engine = import_module(f"opt_{options.backend}.serving.engine").Engine(model, options.slots)
    scheduler, began = Scheduler(engine), time.perf_counter()
    scheduler.warm_up()
    warm, every = time.perf_counter() - began, calls(model, options.requests)
    if options.peer:
        every = [{**call, "do_sample": False} for call in every]
    made, rows = programs(model, options.backend), [Row(make_request(model, **c)) for c in every]
    batched, single = Seconds(), Seconds()
    with batched.counted():
        first = together(scheduler, rows)
    count = sum(len(row.made) for row in rows)
    figures: dict[str, Any] = {
        **vars(options), "peer": options.peer and options.peer.name, "processor": processor(),
        "tokens": count, "tok_s": round(count / batched.clock, 1), "warm_s": round(warm, 1),
    }  # fmt: skip
    alone_count = len(every) if options.alone is None else options.alone
    part = range(0, len(every), max(1, len(every) // max(1, alone_count)))
    if alone_count:
        some, idle = [every[i] for i in part], idle_first(model, scheduler, every)
        usual = np.median(idle, 0)
        waits = (first - idle) / usual
        figures |= {
            "idle_first_s": round(usual[0], 3),
            "wait_p95": round(at_95(waits[:, 0]), 2),
            "cpu_wait_p95": round(at_95(waits[:, 1]), 2),
        }
        figures["compilations"] = programs(model, options.backend) - made
        if engine.is_compiled:
            alone(model, some)  # every program is made now
        with single.counted():
            texts = alone(model, some)
        share = len(some) / len(every)
        figures |= {
            "compared": len(some),
            "alone_tok_s": round(sum(map(len, texts)) / single.clock, 1),
            "ratio": round(single.clock / batched.clock / share, 2),
            "cpu_ratio": round(single.processor / batched.processor / share, 2),
            "differing": sum(rows[i].made != text for i, text in zip(part, texts, strict=True)),
        }  # fmt: skip
    if options.peer:
        seconds, texts = peer_batch(options.peer, every, options.slots)
        figures |= {
            "peer_tok_s": round(count / seconds.clock, 1),
            "peer_ratio": round(seconds.clock / batched.clock, 2),
            "peer_cpu_ratio": round(seconds.processor / batched.processor, 2),
            "peer_differing": sum(row.made != t for row, t in zip(rows, texts, strict=True)),
        }  # fmt: skip
    figures |= {
        "first_s": round(statistics.median(first[:, 0]), 3),
        "first_p95_s": round(at_95(first[:, 0]), 3),
    }
    print(json.dumps(figures))


def at_95(values: np.ndarray) -> float:
    """The 95th percentile."""
    return sorted(values.tolist())[int(0.95 * len(values))]


def processor() -> str:
    """The processor's name and how many there are."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


if __name__ == "__main__":
    main()
