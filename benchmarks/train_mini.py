"""Trains the embedded model: the recipe behind `opt_core/mini` and the figures in its model card.

    python -m benchmarks.train_mini --text tinyshakespeare.txt --out opt_core/mini

The text is karpathy/char-rnn's data/tinyshakespeare/input.txt (1,115,394 bytes, public domain); its
last tenth is held out. Everything is seeded. Writes the model as float16, its tokenizer, and next
to this file results/mini.json with the loss curve (and results/mini.svg where matplotlib is
installed).
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress, TextColumn
from tokenizers import ByteLevelBPETokenizer

from opt_core import GenerationConfig, OPTConfig, OPTTokenizer, TrainConfig
from opt_core.json_files import write_json
from opt_torch import OPTForCausalLM
from opt_torch.training import evaluate, fit

VOCABULARY = 1024
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>"]
MODEL = OPTConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    num_hidden_layers=4,
    num_attention_heads=4,
    ffn_dim=1024,
    max_position_embeddings=256,
    dropout=0.25,
)
TRAINING = TrainConfig(
    max_steps=1500,
    batch_size=16,
    sequence_length=256,
    learning_rate=1.5e-3,
    warmup_steps=100,
    min_lr_ratio=0.05,
    adam_beta2=0.98,
)
SAMPLING = GenerationConfig(
    do_sample=True, temperature=0.7, top_k=50, max_new_tokens=160,
    eos_token_id=2, pad_token_id=1, bos_token_id=2,
)  # fmt: skip
EVALUATE_EVERY = 100


def train_tokenizer(text: str, folder: Path) -> OPTTokenizer:
    """A byte-level BPE of `VOCABULARY` entries in OPT's format, special ids as OPT's."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([text], VOCABULARY, special_tokens=SPECIALS, show_progress=False)
    bpe.save_model(str(folder))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "add_prefix_space": False,
            **special,
        },
    )
    return OPTTokenizer.from_pretrained(folder)


def speeches(text: str, tokenizer: OPTTokenizer) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The text as one stream of ids, and where in it a speech begins."""
    parts = [
        tokenizer.encode(f"{part}\n\n", add_special_tokens=False) for part in text.split("\n\n")
    ]
    starts = np.cumsum([0, *map(len, parts[:-1])])
    return np.concatenate([np.array(part, np.int32) for part in parts]), starts


def batches(
    stream: NDArray[np.int32], starts: NDArray[np.int64], bos: int, config: TrainConfig
) -> Iterator[NDArray[np.int32]]:
    """Rows of </s> and what follows the start of a random speech, as a prompt would have it."""
    rng = np.random.default_rng(config.seed)
    length = config.sequence_length - 1
    starts = starts[starts + length <= len(stream)]
    while True:
        rows = [stream[s : s + length] for s in rng.choice(starts, config.batch_size)]
        yield np.pad(np.stack(rows), ((0, 0), (1, 0)), constant_values=bos)


def held_out_rows(stream: NDArray[np.int32], bos: int, length: int) -> Iterator[NDArray[np.int32]]:
    """Every token once, in rows of </s> and `length` - 1 tokens; the last row is shorter."""
    for start in range(0, len(stream), length - 1):
        yield np.pad(stream[start : start + length - 1], (1, 0), constant_values=bos)[None]


def main() -> None:
    """Trains, evaluates, writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=TRAINING.max_steps)
    args = parser.parse_args()
    config = TrainConfig(**{**vars(TRAINING), "max_steps": args.steps})
    text = args.text.read_text(encoding="utf-8")
    cut = len(text) * 9 // 10
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(text[:cut], args.out)
    bos = tokenizer.bos_token_id
    assert bos is not None  # `train_tokenizer` names it
    stream, starts = speeches(text[:cut], tokenizer)
    held_out = np.array(tokenizer.encode(text[cut:], add_special_tokens=False), np.int32)
    held_out_bytes = len(text[cut:].encode())
    model = OPTForCausalLM(MODEL, seed=config.seed)
    curve: list[dict[str, float]] = []
    best: dict[str, torch.Tensor] = {}
    start = time.time()

    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[loss]}")) as bar:
        task = bar.add_task("training", total=config.max_steps, loss="")
        recent: list[float] = []

        def report(step: int, loss: float) -> None:
            nonlocal best
            recent.append(loss)
            bar.update(task, advance=1, loss=f"loss {loss:.3f}")
            if (step + 1) % EVALUATE_EVERY == 0 or step + 1 == config.max_steps:
                nats = evaluate(model, held_out_rows(held_out, bos, config.sequence_length))
                bits = nats * len(held_out) / held_out_bytes / math.log(2)
                curve.append({
                    "step": step + 1, "train_loss": round(float(np.mean(recent)), 4),
                    "held_out_loss": round(nats, 4), "held_out_bits_per_byte": round(bits, 4),
                })  # fmt: skip
                recent.clear()
                bar.console.print(json.dumps(curve[-1]))
                if bits <= min(point["held_out_bits_per_byte"] for point in curve):
                    best = {k: v.clone() for k, v in model.state_dict().items()}

        fit(model, batches(stream, starts, bos, config), config, report)

    model.load_state_dict(best)
    model.generation_config = SAMPLING
    model.half().save_pretrained(args.out)
    results = Path(__file__).parent / "results"
    trained_tokens = config.max_steps * config.batch_size * config.sequence_length
    summary = {
        "parameters": model.num_parameters(), "training": vars(config),
        "training_tokens": len(stream), "held_out_bytes": held_out_bytes,
        "epochs": round(trained_tokens / len(stream), 1),
        "seconds": round(time.time() - start), "torch": torch.__version__, "curve": curve,
    }  # fmt: skip
    write_json(results / "mini.json", summary)
    plot(curve, results / "mini.svg")


def plot(curve: list[dict[str, float]], path: Path) -> None:
    """Draws the loss curve, where matplotlib is installed."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print(f"no plot: {path} needs matplotlib (pip install 'opt-lm[plots]')")
        return
    steps = [point["step"] for point in curve]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(steps, [point["train_loss"] for point in curve], label="training (with dropout)")
    axes.plot(steps, [point["held_out_loss"] for point in curve], label="held out")
    axes.set(xlabel="step", ylabel="nats per token", title="The embedded model: training loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path)


if __name__ == "__main__":
    main()
