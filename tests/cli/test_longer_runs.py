"""Runs that are made longer, and where their figures go: Weights & Biases' own library, offline."""

import json
import struct
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from opt_core.data import write_blocks
from opt_core.training import read_metrics
from tests.support.files.tiny_folder import save_model

RECORDS: Any = import_module("wandb.proto.wandb_internal_pb2")
SETTINGS = ("--sequence-length", 16, "--batch-size", 2, "--lr-schedule", "constant")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path):
    write_blocks(tmp_path / "data", [np.random.default_rng(0).integers(3, 60, 400)], 16, 60)
    return tmp_path / "data"


def test_more_steps_go_on_after_the_last_one(opt_lm, tiny, data, tmp_path):
    def train(name, steps, *more):
        return opt_lm(
            "train", tiny, data, "--out", tmp_path / name, *SETTINGS, "--max-steps", steps, *more
        )

    assert train("whole", 5).code == 0
    assert train("parts", 3).code == 0
    card = tmp_path / "parts" / "model" / "README.md"
    assert "| steps | 3 of 2 rows |" in card.read_text()
    card.write_text(card.read_text() + "\n## Mine\n")
    assert train("parts", 3, "--resume").code == 0  # nothing to do: the card stays
    assert "## Mine" in card.read_text()
    done = train("parts", 5, "--resume")
    assert done.code == 0, done.err
    assert "5 steps" in done.out
    losses = [[r["loss"] for r in read_metrics(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    weights = [(tmp_path / n / "model" / "model.safetensors").read_bytes() for n in
               ("whole", "parts")]  # fmt: skip
    assert weights[0] == weights[1]
    assert "| steps | 5 of 2 rows |" in card.read_text()
    assert "## Mine" not in card.read_text()
    assert json.loads((tmp_path / "parts" / "run.json").read_text())["config"]["max_steps"] == 5
    done = train("parts", 4, "--resume")
    assert (done.code, done.err) == (
        2, f"error: {tmp_path / 'parts'}: max_steps=4, but 5 steps are done\n",
    )  # fmt: skip
    done = train("parts", 6, "--resume", "--seed", 1)
    assert "was started with other settings: config.seed: 0, now 1\n" in done.err


def stored(file: Path) -> Iterator[Any]:
    """The records in a file of wandb's: LevelDB's log of one block, after a header of 7 bytes."""
    content = file.read_bytes()
    assert len(content) < 1 << 15
    place = 7
    while place < len(content):
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        assert kind == 1  # a record in one piece
        record = RECORDS.Record()
        record.ParseFromString(content[place + 7 : place + 7 + length])
        yield record
        place += 7 + length


def test_wandb_keeps_every_figure(opt_lm, tiny, data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (2, 3):
        done = opt_lm("train", tiny, data, "--out", tmp_path / "run", *SETTINGS, "--wandb",
                      "--max-steps", steps, *(["--resume"] if steps == 3 else []))  # fmt: skip
        assert done.code == 0, done.err
    found, ids = {}, set()
    for file in sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")):
        ids.add(file.stem)
        for record in stored(file):
            items = record.history.item
            values = {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}
            if "loss" in values:
                found[values["_step"]] = values
    assert len(ids) == 1
    for record in read_metrics(tmp_path / "run"):
        for name in ("loss", "learning_rate", "grad_norm"):
            assert found[record["step"]][name] == record[name]


def test_wandb_is_named_where_it_is_missing(opt_lm, tiny, data, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    done = opt_lm("train", tiny, data, "--out", tmp_path / "run", *SETTINGS, "--wandb")
    told = "error: --wandb needs a library: pip install 'opt-lm[wandb]'\n"
    assert (done.code, done.err) == (2, told)
    assert not (tmp_path / "run").exists()
