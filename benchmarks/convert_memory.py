"""Memory and speed of conversions, on a checkpoint of random weights of an official size.

    python -m benchmarks.convert_memory /big/disk --preset opt-6.7b [--save]

Needs three times the checkpoint's size on disk and cleans up after itself. Every format from
safetensors and back, and metaseq's parts; one JSON line each. Beside each conversion the same files
are copied: both start with none of them in the page cache and end with the result on the disk. A
conversion is a process of its own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import conversion
from conversion.formats.torch_zip import write_torch
from conversion.readers import open_any_checkpoint
from conversion.writers import WRITERS
from opt_core.checkpoints import PendingTensor, save_checkpoint
from opt_core.config import OPTConfig
from opt_core.params import ParamSpec, param_specs

_INTERVAL = 0.01  # seconds between two looks at the memory
_BLOCK = 1 << 24
_PARTS = 8
_RESULTS = Path(__file__).parent / "results" / "convert.json"
_BY_ROWS = ("embed_tokens.weight", "fc1.weight", "fc1.bias", "qkv_proj.weight", "qkv_proj.bias")
_BY_COLUMNS = ("fc2.weight", "out_proj.weight")


def make_source(folder: Path, config: OPTConfig, shard: str) -> None:
    """A float16 checkpoint; its values are random, one block repeated."""
    noise = np.random.default_rng(0).standard_normal(1 << 20, np.float32).astype(np.float16) / 50

    def values(spec: ParamSpec) -> np.ndarray:
        return np.resize(noise, spec.size).reshape(spec.shape)

    specs = param_specs(config)
    tensors = {spec.name: lambda spec=spec: values(spec) for spec in specs}
    save_checkpoint(folder, config, tensors, specs, "float16", shard)


def make_parts(folder: Path, source: Path, count: int) -> None:
    """metaseq's model-parallel parts of a checkpoint."""
    folder.mkdir()
    found = open_any_checkpoint(source)
    entries = [(s, found.checkpoint.tensors[s.name]) for s in param_specs(found.read_config())]
    tensors = list(WRITERS["metaseq"].tensors(found.read_config(), entries))
    for part in range(count):

        def take(name: str, array: np.ndarray, part: int = part) -> np.ndarray:
            if "qkv_proj" in name:
                three = array.reshape(3, count, -1, *array.shape[1:])
                return three[:, part].reshape(-1, *array.shape[1:])
            if name.endswith(_BY_COLUMNS):
                return np.ascontiguousarray(np.split(array, count, axis=1)[part])
            return np.split(array, count)[part] if name.endswith(_BY_ROWS) else array

        pending: list[PendingTensor] = []
        for name, tensor in tensors:
            shape = list(tensor.shape)
            if name.endswith((*_BY_ROWS, *_BY_COLUMNS)):
                shape[int(name.endswith(_BY_COLUMNS))] //= count
            fetch = lambda name=name, tensor=tensor: take(name, tensor.read())  # noqa: E731
            pending.append(PendingTensor(name, tuple(shape), tensor.dtype, fetch))
        write_torch(folder / f"reshard-model_part-{part}.pt", pending, "model")
    shutil.copyfile(source / "config.json", folder / "config.json")


def forget(folder: Path) -> int:
    """Drops a folder's files from the page cache; returns their bytes."""
    os.sync()  # what is still to be written, by whomever, would be written during the measurement
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            size += os.fstat(handle).st_size
            os.close(handle)
    return size


def seconds_to_copy(source: Path, destination: Path) -> float:
    """How long a plain copy takes, flushed to the disk."""
    forget(source)
    destination.mkdir()
    start = time.perf_counter()
    for path in source.iterdir():
        with path.open("rb", 0) as reader, (destination / path.name).open("wb", 0) as writer:
            shutil.copyfileobj(reader, writer, _BLOCK)
            os.fsync(writer.fileno())
    seconds = time.perf_counter() - start
    shutil.rmtree(destination)
    return seconds


def convert_alone(source: Path, destination: Path, to: str) -> dict[str, float]:
    """Converts in a new process; its seconds and its peak of memory besides the page cache."""
    forget(source)
    command = [sys.executable, "-m", "benchmarks.convert_memory", "--run"]
    command += [str(source), str(destination), to]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure(name: str, source: Path, destination: Path, to: str, pairs: int) -> dict[str, Any]:
    """Copies and converts in turn; what the last conversion wrote is left there."""
    copies: list[float] = []
    runs: list[dict[str, float]] = []
    for _ in range(pairs):
        shutil.rmtree(destination, ignore_errors=True)
        copies.append(seconds_to_copy(source, destination.with_name("copy")))
        runs.append(convert_alone(source, destination, to))
    size = forget(source)
    return {
        "convert": name,
        "gb": round(size / 1e9, 2),
        "mb_s": round(size / median(run["seconds"] for run in runs) / 1e6),
        "copy_mb_s": round(size / median(copies) / 1e6),
        "of_copy": [round(c / run["seconds"], 2) for c, run in zip(copies, runs, strict=True)],
        "cpu_seconds": round(median(run["cpu_seconds"] for run in runs), 1),
        "peak_gib": round(max(run["peak_gib"] for run in runs), 3),
    }


def convert_watched(source: str, destination: str, to: str) -> dict[str, float]:
    """Converts in this process while a thread watches its memory."""
    peak, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(_INTERVAL):
            peak = max(peak, anonymous_memory())

    thread = threading.Thread(target=watch)
    thread.start()
    start, processor = time.perf_counter(), time.process_time()
    conversion.convert(source, destination, to, max_shard_size="5GB")
    seconds = time.perf_counter() - start
    ended.set()
    thread.join()
    used = time.process_time() - processor
    return {"seconds": seconds, "cpu_seconds": used, "peak_gib": peak / 2**30}


def anonymous_memory() -> int:
    """Bytes of this process that are no part of a file."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    fields = dict(line.split(":", 1) for line in text.splitlines())
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


def results(
    work: Path, config: OPTConfig, formats: list[str], shard: str, pairs: int
) -> Iterator[dict[str, Any]]:
    """One measurement after the other; never more than three checkpoints on the disk."""
    source, made, back = work / "source", work / "made", work / "back"
    make_source(source, config, shard)
    for to in formats:
        yield measure(f"safetensors -> {to}", source, made, to, pairs)
        yield measure(f"{to} -> safetensors", made, back, "safetensors", pairs)
        shutil.rmtree(back)
        shutil.rmtree(made)
    make_parts(made, source, _PARTS)
    name = f"metaseq in {_PARTS} parts -> safetensors"
    yield measure(name, made, back, "safetensors", pairs)


def main() -> None:
    """Reads the command line, prints the results."""
    if sys.argv[1:2] == ["--run"]:
        print(json.dumps(convert_watched(*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where there is room")
    parser.add_argument("--preset", default="opt-6.7b")
    parser.add_argument("--layers", type=int, help="fewer layers than the preset has")
    parser.add_argument("--formats", nargs="*", default=list(WRITERS), choices=list(WRITERS))
    parser.add_argument("--shard", default="5GB")
    parser.add_argument("--pairs", type=int, default=1, help="copies and conversions of each kind")
    parser.add_argument("--save", action="store_true", help=f"write {_RESULTS.name}")
    options = parser.parse_args()
    config = OPTConfig.from_preset(options.preset)
    if options.layers:
        config = config.replace(num_hidden_layers=options.layers)
    work = options.folder / f"convert-{os.getpid()}"
    work.mkdir(parents=True)
    found: list[dict[str, Any]] = []
    try:
        for result in results(work, config, options.formats, options.shard, options.pairs):
            print(json.dumps(result), flush=True)
            found.append(result)
    finally:
        shutil.rmtree(work)
    if options.save:
        _RESULTS.write_text(f"{json.dumps(found, indent=1)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
