"""Measures how much anonymous memory loading a checkpoint takes, and prints one JSON line.

    python -m benchmarks.memory --model DIR --dtype bfloat16 [--system transformers]

A child process loads the model while its RssAnon (/proc/PID/status: memory that belongs to the
process alone, pages of mapped files left out) is sampled every few milliseconds. `imports_gib` is
what there was before loading; `peak_gib` is the largest value seen and `model_gib` what stayed,
imports included.
"""

import argparse
import json
import selectors
import subprocess
import sys
import time
from pathlib import Path

LOADERS = {
    "opt-lm": "import opt_torch as m; load = m.OPTForCausalLM.from_pretrained; "
    "kw = dict(dtype={dtype!r})",
    "transformers": "import torch, transformers as m; load = m.OPTForCausalLM.from_pretrained; "
    "kw = dict(dtype=torch.{dtype})",
}
CHILD = """
import sys
{load}
print("ready", flush=True); sys.stdin.readline()
model = load({model!r}, **kw)
print("loaded", flush=True); sys.stdin.readline()
"""


def rss_anon(pid: int) -> float:
    """Anonymous resident memory of a process in GiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 2**20
    raise RuntimeError("this system does not report RssAnon; the benchmark needs Linux")


def measure(system: str, model: str, dtype: str) -> dict[str, float]:
    """Loads a model in a child process and watches its memory."""
    code = CHILD.format(load=LOADERS[system].format(dtype=dtype), model=model)
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True,
    ) as child:  # fmt: skip
        assert child.stdin is not None
        assert child.stdout is not None
        if child.stdout.readline() != "ready\n":
            raise RuntimeError(f"{system} could not be imported")
        result = {"imports_gib": rss_anon(child.pid)}
        start, peak = time.time(), 0.0
        child.stdin.write("go\n")
        child.stdin.flush()
        with selectors.DefaultSelector() as waiting:
            waiting.register(child.stdout, selectors.EVENT_READ)
            while not waiting.select(timeout=0.005):
                peak = max(peak, rss_anon(child.pid))
        if child.stdout.readline() != "loaded\n":
            raise RuntimeError(f"{system} could not load {model}")
        result["load_s"] = time.time() - start
        result["model_gib"] = rss_anon(child.pid)
        result["peak_gib"] = max(peak, result["model_gib"])
        child.stdin.write("stop\n")
        child.stdin.flush()
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--system", choices=LOADERS, default="opt-lm")
    args = parser.parse_args()
    result = measure(args.system, args.model, args.dtype)
    print(json.dumps({"system": args.system, "model": args.model, "dtype": args.dtype, **result}))


if __name__ == "__main__":
    main()
