"""Compares this project with the libraries installed beside it, turn by turn in one run.

    python -m benchmarks.compare --model DIR --rounds 3 \\
        --python transformers-tf=ENV/bin/python --models ctranslate2=CT2_DIR --only decode

For each pair of `PAIRS`, ours and the peer run one after the other, `--rounds` times: a machine
whose speed drifts then slows both. Written to `benchmarks/results/speed.json`, pair by pair: the
median rates, the ratio of the medians, the smallest and largest ratio of a round, and the share of
the machine's limit (`benchmarks.limits`) that ours reaches. `--table` prints what is there as the
README has it, and `--chart FILE` draws it; neither measures anything.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.limits import measure
from opt_cli.speed import SHAPES
from opt_core import OPTConfig
from opt_core.params import count_parameters

RESULTS = Path(__file__).parent / "results" / "speed.json"
PEERS = Path(__file__).parent / "peers.py"

GENERATE = ("decode", "batch", "prefill")
PAIRS: list[tuple[str, str, tuple[str, ...]]] = [
    ("torch float32", "transformers float32", (*GENERATE, "train")),
    ("torch bfloat16", "transformers bfloat16", GENERATE),
    ("torch int8", "ctranslate2 int8", GENERATE),
    ("flax float32", "transformers-flax float32", (*GENERATE, "train")),
    ("flax float32", "keras-hub-jax float32", (*GENERATE, "train")),
    ("tf float32", "transformers-tf float32", (*GENERATE, "train")),
    ("tf float32", "keras-hub-tf float32", (*GENERATE, "train")),
]
"""Ours, the peer (each with its type of weights), and the tasks to compare them on."""

BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}


def run(command: list[str]) -> dict[str, Any]:
    """Runs one benchmark in a process of its own and reads its JSON line."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def weights_read(config: OPTConfig) -> int:
    """Numbers that a decoded token reads: every weight, but of the positions only one row."""
    positions = (config.max_position_embeddings + 2) * config.hidden_size
    return count_parameters(config) - positions


def limit(config: OPTConfig, task: str, dtype: str, limits: dict[str, float]) -> float:
    """Tokens per second that the machine's ceilings allow.

    A decoded token reads every weight once, a row of a table aside, and eight rows read them
    together; a token of a prompt costs two operations per weight, one of training six.
    """
    weights = weights_read(config)
    if task in ("decode", "batch"):
        return SHAPES[task][0] * limits["read_gb_s"] * 1e9 / (weights * BYTES[dtype])
    rate = limits["bfloat16_gflop_s" if dtype == "bfloat16" else "float32_gflop_s"]
    return rate * 1e9 / (weights * (6 if task == "train" else 2))


def compare(
    model: Path,
    pair: tuple[str, str],
    task: str,
    rounds: int,
    pythons: dict[str, str],
    models: dict[str, str],
) -> dict[str, Any]:
    """Measures one pair on one task, A B A B."""
    backend, dtype = pair[0].split()
    system, peer_dtype = pair[1].split()
    own = [sys.executable, "-m", "benchmarks.speed", "--backend", backend, "--model", str(model)]
    own += ["--quantize", dtype] if dtype == "int8" else ["--dtype", dtype]
    peer = [pythons.get(system, sys.executable), str(PEERS), "--system", system]
    peer += ["--model", models.get(system, str(model)), "--dtype", peer_dtype]
    found = [[run([*command, "--task", task]) for command in (own, peer)] for _ in range(rounds)]
    ours, theirs = ([r[i]["tok_s"] for r in found] for i in range(2))
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    rates = [statistics.median(side) for side in (ours, theirs)]
    return {
        "task": task, "ours": pair[0], "peer": pair[1], "rounds": rounds,
        "ours_tok_s": round(rates[0], 1), "peer_tok_s": round(rates[1], 1),
        "ratio": round(rates[0] / rates[1], 2),
        "ratios": [round(min(ratios), 2), round(max(ratios), 2)],
        "first_s": [statistics.median(r[i]["first_s"] for r in found) for i in range(2)],
        "rss_gib": [max(r[i]["rss_gib"] for r in found) for i in range(2)],
    }  # fmt: skip


def machine() -> dict[str, Any]:
    """The machine that the figures were taken on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
    return {
        "processor": next(found, platform.processor() or "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": [flag for flag in wanted if flag in flags],
    }


def versions() -> dict[str, str]:
    """The versions of the frameworks here; a peer in another environment has its own."""
    names = ("torch", "tensorflow", "keras", "jax", "flax", "transformers", "numpy")
    return {name: metadata.version(name) for name in names}


def table(results: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    rows = [
        "| model | task | this project | tok/s | compared with | tok/s | ratio (of single rounds) | of the limit |",  # noqa: E501
        "|---|---|---|---|---|---|---|---|",
    ]
    tasks = list(SHAPES)
    for row in sorted(results["rows"], key=lambda row: (*_pair(row), tasks.index(row["task"]))):
        low, high = row["ratios"]
        rows.append(
            f"| {row['model']} | {row['task']} | {row['ours']} | {row['ours_tok_s']:.4g} "
            f"| {row['peer']} | {row['peer_tok_s']:.4g} "
            f"| **{row['ratio']:.2f}** ({low:.2f}-{high:.2f}) | {row['share']:.0%} |"
        )
    return "\n".join(rows)


def _pair(row: dict[str, Any]) -> tuple[str, str, str]:
    """The pair of systems and the model that the bars of one group share."""
    return row["ours"], row["peer"], row["model"]


def chart(results: dict[str, Any], file: Path) -> None:
    """Draws the ratios as bars, one group per pair."""
    from matplotlib import pyplot

    pairs = sorted({_pair(row) for row in results["rows"]})
    tasks = [task for task in SHAPES if any(row["task"] == task for row in results["rows"])]
    figure, axes = pyplot.subplots(figsize=(9, 1 + 0.9 * len(pairs)), layout="constrained")
    height = 0.8 / len(tasks)
    for i, task in enumerate(tasks):
        ratios = {_pair(row): row["ratio"] for row in results["rows"] if row["task"] == task}
        places = [p - i * height for p, pair in enumerate(pairs) if pair in ratios]
        bars = axes.barh(places, [ratios[p] for p in pairs if p in ratios], height, label=task)
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([p - 0.3 for p in range(len(pairs))])
    axes.set_yticklabels([f"{ours}, {model}\nvs {peer}" for ours, peer, model in pairs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("tokens per second, as a multiple of the other library's")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def named(entries: list[str]) -> dict[str, str]:
    """NAME=VALUE arguments as a dictionary."""
    return dict(entry.split("=", 1) for entry in entries)


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--python", action="append", default=[], metavar="PEER=PYTHON")
    parser.add_argument("--models", action="append", default=[], metavar="PEER=DIR")
    parser.add_argument("--only", action="append", default=[], help="words of pairs or tasks")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    if args.model is not None:
        measure_all(args)
    results = json.loads(args.out.read_text())
    if args.table:
        print(table(results))
    if args.chart is not None:
        chart(results, args.chart)


def measure_all(args: argparse.Namespace) -> None:
    """Measures every chosen pair and writes the results after each, earlier ones replaced."""
    config, limits = OPTConfig.from_pretrained(args.model), measure()
    results: dict[str, Any] = {"rows": []}
    if args.out.exists():
        results = json.loads(args.out.read_text())
    results |= {"machine": machine(), "versions": versions(), "limits": limits}
    print(json.dumps(limits), flush=True)
    for ours, peer, tasks in PAIRS:
        for task in tasks:
            words = {*ours.split(), *peer.split(), task}
            if not set(args.only) <= words:
                continue
            try:
                row = compare(
                    args.model, (ours, peer), task, args.rounds, named(args.python),
                    named(args.models),
                )  # fmt: skip
            except RuntimeError as error:
                print(f"left out: {ours} and {peer}, {task}: {error}", flush=True)
                continue
            ceiling = limit(config, task, ours.split()[1], limits)
            row["model"] = args.model.name
            row["share"] = round(row["ours_tok_s"] / ceiling, 3)
            same = ("task", "ours", "peer", "model")
            kept = [r for r in results["rows"] if any(r[key] != row[key] for key in same)]
            results["rows"] = [*kept, row]
            args.out.write_text(json.dumps(results, indent=2) + "\n")
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
