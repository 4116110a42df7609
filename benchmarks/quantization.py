"""Measures what smaller weights cost in quality: perplexity, and how far logits are off.

    python -m benchmarks.quantization --model DIR --text FILE [--smooth] \\
        [--ctranslate2 PYTHON=DIR]

For each backend and each kind of weights: the perplexity of the text's windows, and the logit
error, which is the root mean square of the difference to the same backend's float32 logits as a
share of theirs. `--smooth` also measures int8 after `conversion.smooth`; `--ctranslate2` measures
CTranslate2's int8, in an environment of its own, on what its converter made of the same model.
Writes results/quantization.json next to this file; `--chart FILE` draws what is there.
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.compare import PEERS, machine, named, versions
from conversion.backends import BACKENDS, load_backend, to_numpy
from conversion.smoothquant import calibration_rows, smooth
from opt_core import OPTTokenizer
from opt_core.evaluation import text_perplexity
from opt_core.hub import resolve
from opt_core.json_files import write_json

RESULTS = Path(__file__).parent / "results" / "quantization.json"
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int8": {"dtype": "float32", "quantize": "int8"},
    "int4": {"dtype": "float32", "quantize": "int4"},
}
ROWS = 8
"""Windows whose logits are compared."""


def logits_of(model: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits of one row at a time, so that no more than that is in memory twice."""
    rows = [to_numpy(model(row[None]).logits).astype(np.float32) for row in ids]
    return np.concatenate(rows)


def error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Root mean square of the difference, as a share of the expected values'."""
    off = np.linalg.norm((found - expected).ravel()) / np.linalg.norm(expected.ravel())
    return float(f"{off:.3g}")


def of_ctranslate2(python: str, model: str, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """CTranslate2's int8 logits."""
    with tempfile.TemporaryDirectory() as folder:
        given, found = Path(folder, "ids.npy"), Path(folder, "logits.npy")
        np.save(given, ids)
        command = [python, str(PEERS), "--system", "ctranslate2", "--model", model]
        command += ["--dtype", "int8", "--ids", str(given), "--logits", str(found)]
        subprocess.run(command, check=True)
        return np.load(found)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row of the results after the other."""
    path = resolve(args.model)
    tokenizer, text = OPTTokenizer.from_pretrained(path), args.text.read_text(encoding="utf-8")
    ids = calibration_rows(tokenizer.encode(text), ROWS, args.window)
    peers = named(args.ctranslate2)
    with tempfile.TemporaryDirectory() as folder:
        smoothed = Path(folder, "smoothed")
        if args.smooth:
            smooth(path, smoothed, ids, args.alpha)
        for backend in args.backend or BACKENDS:
            kinds = {name: (path, options) for name, options in KINDS.items()}
            if args.smooth:
                kinds["int8, smoothed"] = smoothed, KINDS["int8"]
            scoring = import_module(f"{BACKENDS[backend].module}.scoring")
            expected: Any = None
            for kind, (source, options) in kinds.items():
                model = load_backend(backend).from_pretrained(source, **options)
                found = logits_of(model, ids)
                expected = found if expected is None else expected
                scores = partial(scoring.token_scores, model)
                result = text_perplexity(
                    scores, text, tokenizer, args.window, batch_size=4, limit=args.limit
                )
                yield {
                    "backend": backend, "weights": kind,
                    "perplexity": round(result.perplexity, 4),
                    "logit_error": error(found, expected),
                }  # fmt: skip
                del model
            for python, directory in peers.items():
                off = error(of_ctranslate2(python, directory, ids), expected)
                peers = {}  # once is enough: every backend's float32 logits are the same
                yield {"backend": "ctranslate2", "weights": "int8", "logit_error": off}


def chart(results: list[dict[str, Any]], file: Path) -> None:
    """Draws logit errors, one group of bars per kind of weights."""
    from matplotlib import pyplot

    rows = [row for row in results if row["logit_error"]]
    systems = list(dict.fromkeys(row["backend"] for row in rows))
    kinds = list(dict.fromkeys(row["weights"] for row in rows))
    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    width = 0.8 / len(systems)
    for i, system in enumerate(systems):
        mine = {row["weights"]: row["logit_error"] for row in rows if row["backend"] == system}
        places = [kinds.index(kind) + i * width for kind in mine]
        bars = axes.bar(places, [100 * value for value in mine.values()], width, label=system)
        axes.bar_label(bars, fmt="%.2g", padding=2, fontsize=8)
    axes.set_xticks([i + 0.4 - width / 2 for i in range(len(kinds))], kinds)
    axes.set_ylabel("logits off, % of float32's size")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="mini")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--backend", action="append", choices=BACKENDS)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--limit", type=int, help="windows whose perplexity is taken")
    parser.add_argument("--smooth", action="store_true")
    parser.add_argument("--alpha", type=float, default=0.5)
    parser.add_argument("--ctranslate2", action="append", default=[], metavar="PYTHON=DIR")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--chart", type=Path)
    args = parser.parse_args()
    if args.text is not None:
        rows = []
        for row in measure(args):
            rows.append(row)
            print(json.dumps(row), flush=True)
        about = {"model": args.model, "text": args.text.name, "window": args.window}
        write_json(args.out, about | {"machine": machine(), "versions": versions(), "rows": rows})
    if args.chart is not None:
        chart(json.loads(args.out.read_text())["rows"], args.chart)


if __name__ == "__main__":
    main()
