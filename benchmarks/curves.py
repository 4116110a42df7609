"""Trains the same small model in each backend and compares the losses, step by step.

    python -m benchmarks.curves --text tinyshakespeare.txt --tokenizer FOLDER

The text is karpathy/char-rnn's data/tinyshakespeare/input.txt, the tokenizer OPT's own. Same
starting weights, same batches, no dropout, whose random numbers every framework draws in its own
way. Writes results/curves.json and results/curves.svg next to this file.
"""

import argparse
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.compare import versions
from conversion.backends import BACKENDS, load_backend
from opt_core import OPTConfig, OPTTokenizer, TrainConfig
from opt_core.data import Batches, DataConfig, TokenBlocks, prepare
from opt_core.json_files import write_json

RESULTS = Path(__file__).parent / "results"
MODEL = OPTConfig(
    vocab_size=50272, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, ffn_dim=512,
    max_position_embeddings=128, dropout=0.0,
)  # fmt: skip
# At three times this rate, and a vocabulary of 1024, training was chaotic: differences of rounding
# grew a hundredfold every ten steps, until the curves were 4 % apart.
TRAINING = TrainConfig(
    max_steps=200, batch_size=8, sequence_length=128, learning_rate=1e-3, warmup_steps=20
)


def blocks(text: Path, tokenizer: str) -> TokenBlocks:
    """The text as rows of tokens; they stay mapped when their file is gone."""
    how = DataConfig(TRAINING.sequence_length, validation_fraction=0)
    with tempfile.TemporaryDirectory() as folder:
        prepare([text], Path(folder, "data"), OPTTokenizer.from_pretrained(tokenizer), how)
        return TokenBlocks.open(Path(folder, "data", "train"))


def losses(backend: str, rows: TokenBlocks) -> list[float]:
    """The loss of every step in one backend."""
    model = load_backend(backend)(MODEL, seed=TRAINING.seed)
    trainer = import_module(f"{BACKENDS[backend].module}.trainer").Trainer(model, TRAINING)
    batches = Batches(rows, TRAINING.batch_size, TRAINING.seed)
    return [trainer.step(next(batches), step)[0] for step in range(TRAINING.max_steps)]


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """The curves above, one within the other; how far they are apart below."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    first, reference = next(iter(curves.items()))
    for i, (name, values) in enumerate(curves.items()):
        steps = range(1, len(values) + 1)
        upper.plot(steps, values, color=f"C{i}", label=name, linewidth=6 - 2 * i, alpha=0.5)
        if name != first:
            apart = [abs(ours / r - 1) for ours, r in zip(values, reference, strict=True)]
            lower.semilogy(steps, apart, color=f"C{i}", label=f"{name} from {first}")
    upper.set(ylabel="loss (nats per token)", title="The same training in three frameworks")
    lower.axhline(0.01, color="black", linewidth=0.8)
    lower.set(xlabel="step", ylabel="apart (of 1)")
    for axes in (upper, lower):
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokenizer", required=True, help="folder with vocab.json and merges.txt")
    given = parser.parse_args()
    rows = blocks(given.text, given.tokenizer)
    curves = {name: losses(name, rows) for name in BACKENDS}
    steps = list(zip(*curves.values(), strict=True))
    summary: dict[str, Any] = {
        "model": MODEL.to_dict(), "training": vars(TRAINING), "versions": versions(),
        "largest_difference": max(max(step) / min(step) - 1 for step in steps),
        "last_of_first": {name: c[-1] / c[0] for name, c in curves.items()},
        "curves": {name: [round(loss, 6) for loss in c] for name, c in curves.items()},
    }  # fmt: skip
    write_json(RESULTS / "curves.json", summary)
    draw(curves, RESULTS / "curves.svg")
    print({name: summary[name] for name in ("largest_difference", "last_of_first")})


if __name__ == "__main__":
    main()
