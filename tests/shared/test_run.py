"""Whole runs on every backend: interrupted ones go on to the same result; every head learns."""

import importlib
import json

import numpy as np
import pytest

from opt_core.data.batches import Batches
from opt_core.training.config import TrainConfig
from opt_core.training.loop import run
from opt_core.training.run_folder import read_metrics
from tests.support.backends import CLASSES
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts

pytestmark = pytest.mark.dealt

CONFIG = CONFIGS["pre_ln"].replace(num_labels=3, attention_dropout=0.1)
TRAIN = TrainConfig(
    max_steps=8, batch_size=4, sequence_length=12, learning_rate=3e-3, save_every=3,
    gradient_accumulation_steps=2,
)  # fmt: skip
SMALL = CONFIG.replace(num_hidden_layers=1)
LOSS_TOLERANCE = {"torch": 0, "flax": 0, "tf": 1e-6}


class Stopped(Exception):
    pass


def train(backend, model, folder, config, examples, stop=None, **options):
    """Runs in a folder, up to a step if one is given."""

    def watch(record):
        if record["step"] == stop:
            raise Stopped

    trainer = importlib.import_module(f"opt_{backend.name}.trainer").Trainer(model, config)
    return run(
        trainer, Batches(examples, config.batch_size, 1), config, folder, watch=watch, **options
    )


@pytest.mark.parametrize("rank", [0, 2], ids=["all", "adapters"])
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(backend, folder, tmp_path, rank):
    """With dropout on, in parts, and again and again; with adapters, made longer instead."""
    config = TRAIN.replace(lora_rank=rank, lr_schedule="constant" if rank else "cosine")
    examples = list(make_prompts(SMALL, 18, 12))

    def load():
        return backend.load(folder(SMALL))

    train(backend, load(), tmp_path / "whole", config, examples)
    if rank:
        shorter = config.replace(max_steps=5)
        train(backend, load(), tmp_path / "parts", shorter, examples, resume=True)
    # What follows from a second time is core's: once where every run is compiled anew.
    for stop in () if rank else (2, 5) if backend.name == "torch" else (5,):
        with pytest.raises(Stopped):
            train(backend, load(), tmp_path / "parts", config, examples, stop, resume=True)
    model = load()
    train(backend, model, tmp_path / "parts", config, examples, resume=True)
    losses = [
        [record["loss"] for record in read_metrics(tmp_path / name)] for name in ("whole", "parts")
    ]
    tolerance = LOSS_TOLERANCE[backend.name]
    np.testing.assert_allclose(losses[1], losses[0], rtol=tolerance, atol=0)
    files = ["model/model.safetensors", *(["adapter/adapter_model.safetensors"] if rank else [])]
    if not tolerance:
        for file in files:
            first, second = ((tmp_path / name / file).read_bytes() for name in ("whole", "parts"))
            assert first == second
    card = (tmp_path / "parts" / "model" / "README.md").read_text()
    assert "| steps | 8 of 4 rows |" in card
    assert f"| training | 8 | {losses[1][-1]:.4f} |" in card
    # The model that is written is the model that was trained, adapters and all.
    written = backend.load(tmp_path / "parts" / "model")
    ids = make_prompts(SMALL, 2, 9)
    if backend.name != "tf":
        model.eval()
    for_ids = [backend.run(one, input_ids=ids).logits for one in (model, written)]
    np.testing.assert_allclose(for_ids[0], for_ids[1], rtol=0, atol=2e-5)


def labelled(count):
    """Texts whose class is a token that occurs in them, padded on the right."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        ids, label = rng.integers(10, 99, 12), number % 3
        length = rng.integers(6, 13)
        ids[rng.integers(1, length)] = 4 + label
        ids[length:] = 1
        mask = np.arange(12) < length
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": np.array(label)})
    return rows


def questions(count):
    """Texts whose answer is between two tokens that mark it."""
    rows = []
    for row in labelled(count):
        ids = row["input_ids"]
        start = int(np.flatnonzero((ids >= 4) & (ids < 7))[0])
        places = {"start_positions": np.array(start), "end_positions": np.array(start)}
        rows.append({k: v for k, v in row.items() if k != "labels"} | places)
    return rows


@pytest.mark.parametrize(
    ("head", "make", "rank"),
    [("sequence_classification", labelled, 8), ("question_answering", questions, 0)],
)
def test_other_heads_learn(backend, folder, tmp_path, head, make, rank):
    config = TRAIN.replace(
        max_steps=60, batch_size=12, learning_rate=2e-2, warmup_steps=5, save_every=0,
        eval_every=20, gradient_accumulation_steps=1, lora_rank=rank,
        lora_targets=("v_proj", "fc1", "fc2"),
        dropout=0.0,
    )  # fmt: skip
    model_config = config.model_config(CONFIG).replace(attention_dropout=0.0)
    examples = make(48)
    model = backend.load(folder(model_config, head), head)
    result = train(
        backend, model, tmp_path, config, examples,
        validation=lambda: Batches(examples, 12, 0, False, 1),
    )  # fmt: skip
    losses = [r["eval_loss"] for r in read_metrics(tmp_path) if "eval_loss" in r]
    assert result.best_loss == min(losses)
    assert min(losses) < 0.35
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["architectures"] == [CLASSES[head]]
