"""`opt-lm train` and `opt-lm plot` as users meet them."""

import errno
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from opt_core import TrainConfig
from opt_core.data import TokenBlocks, write_blocks
from opt_core.training import run_folder
from opt_core.training.run_folder import read_metrics
from opt_torch import OPTForCausalLM, OPTForSequenceClassification
from tests.support.files.tiny_folder import save_model

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def data(tmp_path):
    ids = np.random.default_rng(0).integers(3, 60, 400)
    for name in ("train", "validation"):
        write_blocks(tmp_path / "data" / name, [ids], 16, 60)
    return tmp_path / "data"


def test_every_setting_is_an_option_with_a_help_text():
    """Also where Python drops documentation (-OO)."""
    command = [sys.executable, "-OO", "-m", "opt_cli", "train", "--help"]
    environment = os.environ | {"COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    for field in fields(TrainConfig):
        option = f"--{field.name.replace('_', '-')}"
        assert re.search(rf"{option} +(N|X|NAME|) +\S", done.stdout), option
    assert "Steps over which the rate rises" in done.stdout


def test_text(opt_lm, tiny, data, tmp_path):
    """From blocks: a run, the same command again, and the picture."""
    command = ("train", tiny, data, "--out", tmp_path / "run", "--max-steps", 4, "--batch-size", 4,
               "--sequence-length", 16, "--eval-every", 2, "--save-every", 1)  # fmt: skip
    code, out, err = opt_lm(*command, "--json")
    assert code == 0, err
    assert "validation loss" in err
    told = json.loads(out)
    assert (told["steps"], told["skipped"]) == (4, 0)
    assert told["best_loss"] == min(
        r["eval_loss"] for r in read_metrics(tmp_path / "run") if "eval_loss" in r
    )
    model = OPTForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert model.num_parameters() == OPTForCausalLM.from_pretrained(tiny).num_parameters()
    assert (tmp_path / "run" / "model" / "vocab.json").exists()
    code, _, err = opt_lm(*command)
    assert code == 2
    assert "already exists; --resume goes on with it" in err
    code, out, _ = opt_lm(*command, "--resume")
    assert code == 0
    assert "4 steps" in out
    code, out, _ = opt_lm("plot", tmp_path / "run", "--out", tmp_path / "loss.png")
    assert code == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_classification_with_adapters(opt_lm, tiny, tmp_path):
    rows = [{"text": f"the {w}", "label": n} for w, n in (("cat", "animal"), ("car", "thing")) * 4]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, out, err = opt_lm(
        "train", tiny, path, "--out", tmp_path / "run", "--task", "classification", "--epochs", 3,
        "--batch-size", 4, "--sequence-length", 16, "--lora-rank", 2, "--lora-targets", "fc1,fc2",
    )  # fmt: skip
    assert code == 0, err
    assert "6 steps" in out
    model = OPTForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert model.config.id2label == {0: "animal", 1: "thing"}
    about = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert about["target_modules"] == ["fc1", "fc2"]


def test_answers_to_questions(opt_lm, tiny, tmp_path):
    """SQuAD's own layout: trained, validated, and measured with what came of it."""
    context = "The quick brown fox jumps over the lazy dog. " * 4
    answer = {"text": "the lazy dog", "answer_start": context.index("the lazy dog")}
    asked = [{"id": f"q{i}", "question": "Over whom?", "answers": [answer]} for i in range(3)]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": asked}]}]}))
    code, out, err = opt_lm(
        "train", tiny, path, "--out", tmp_path / "run", "--task", "qa", "--validation", path,
        "--max-steps", 40, "--eval-every", 20, "--batch-size", 4, "--sequence-length", 48,
        "--learning-rate", 1e-2, "--dropout", 0,
    )  # fmt: skip
    assert code == 0, err
    assert "validation loss" in out
    model = ("-m", tmp_path / "run" / "model", "--max-length", 48, "--stride", 16)
    code, out, err = opt_lm("eval", "qa", path, *model, "--json")
    assert code == 0, err
    assert json.loads(out)["exact_match"] == 100


def test_from_scratch_and_tensorboard(opt_lm, tiny, data, tmp_path, monkeypatch):
    told = []

    class Writer:
        def __init__(self, folder):
            assert folder == str(tmp_path / "run" / "tensorboard")

        def add_scalar(self, *scalar):
            told.append(scalar)

        def close(self):
            told.append("closed")

    command = ("train", tiny, data, "--max-steps", 2, "--batch-size", 25, "--sequence-length", 16,
               "--from-scratch", "--seed", 3, "--dropout", 0, "--tensorboard", "--out")  # fmt: skip
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    code, _, err = opt_lm(*command, tmp_path / "run")
    assert code == 2
    assert "--tensorboard needs a library: pip install 'opt-lm[tensorboard]'" in err
    assert not (tmp_path / "run").exists()
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Writer))
    code, _, err = opt_lm(*command, tmp_path / "run")
    assert code == 0, err
    records = read_metrics(tmp_path / "run")
    names = ("loss", "learning_rate", "grad_norm", "tokens_per_s")
    assert told == [*((name, r[name], r["step"]) for r in records for name in names), "closed"]
    # The first loss is that of new weights, on all of the data.
    config = OPTForCausalLM.from_pretrained(tiny).config
    blocks = TokenBlocks.open(data / "train")
    rows = torch.tensor(np.stack([blocks[i] for i in range(len(blocks))]))
    fresh = OPTForCausalLM(config, seed=3).eval()
    assert records[0]["loss"] == pytest.approx(fresh(rows, labels=rows).loss.item(), rel=1e-5)


def test_disks_that_refuse(opt_lm, tiny, data, tmp_path, monkeypatch):
    """A full one keeps the last good checkpoint, and the run goes on when there is room again."""
    real, written = run_folder.write_safetensors, []

    def write(path, tensors):
        written.append(path)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, tensors)

    command = ("train", tiny, data, "--max-steps", 3, "--save-every", 1, "--batch-size", 4,
               "--sequence-length", 16, "--out")  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_safetensors", write)
        code, out, err = opt_lm(*command, tmp_path / "run")
    assert (code, out) == (2, "")
    assert "No space left on device; the last good one is of step 1\n" in err
    code, out, err = opt_lm(*command, tmp_path / "run", "--resume")
    assert code == 0, err
    assert "3 steps" in out
    (tmp_path / "file").touch()
    code, out, err = opt_lm(*command, tmp_path / "file" / "run")
    assert (code, out) == (2, "")
    assert "file/run: cannot be used: Not a directory\n" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--learning-rate", "0"), "--learning-rate: expected a number > 0"),
        (("--task", "poetry"), "--task: expected text, classification, qa"),
        (("--device", "cuda", "--backend", "flax"), "--device is for the torch backend"),
        (("--preset", "opt-1b"), "no training recipe 'opt-1b'"),
        (("--sequence-length", "8"), "blocks of 16 tokens, --sequence-length is 8"),
        (("--epochs", "1", "--max-steps", "4"), "give one of them"),
        (("--backend", "mxnet"), "backend: expected one of torch, tf, flax"),
    ],
    ids=str,
)
def test_bad_settings(opt_lm, tiny, data, tmp_path, options, message):
    given = ("--sequence-length", "16", *options)
    code, _, err = opt_lm("train", tiny, data, "--out", tmp_path / "run", *given)
    assert code == 2
    assert message in " ".join(err.split())
    assert not (tmp_path / "run").exists()


SPAN = {"context": "A dog.", "qas": [{"id": "a", "question": "Who?", "answers": [
    {"text": "cat", "answer_start": 2}]}]}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", b"", "data.txt: is empty"),
        ("data.txt", b"\x7fELF\0\0", "data.txt: binary data, not text"),
        ("data.txt", b"la \xe9 \xc3\xa9", "data.txt: byte 3 (0xe9) is not UTF-8"),
        ("data.txt", b"one two", "data.txt: train: 8 tokens fill no block of 16"),
        ("data.jsonl", b'{"text": "a", "label": -1}', "data.jsonl: labels: expected class numbers"),
        ("data.jsonl", b'{"text": "a", "label": 7}', "found 7 among 1 rows: more classes than"),
        ("data.json", json.dumps({"data": [{"paragraphs": [SPAN]}]}).encode(),
         "data.json: none of 1 questions is left: 1 answer is not where it should start"),
    ],
)  # fmt: skip
def test_bad_data_is_one_line_and_leaves_nothing(opt_lm, tiny, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    task = {".txt": "text", ".jsonl": "classification", ".json": "qa"}[path.suffix]
    given = ("--task", task, "--sequence-length", "16", "--out", tmp_path / "new" / "run")
    code, out, err = opt_lm("train", tiny, path, *given)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "new" / "run").exists()


def test_a_text_that_cannot_be_split(opt_lm, tiny, tmp_path):
    """One document: it is validated on another file, of which nothing is held out."""
    for name in ("train.txt", "other.txt"):
        (tmp_path / name).write_text(" ".join(f"{i} quick foxes and a dog," for i in range(40)))
    command = ("train", tiny, tmp_path / "train.txt", "--out", tmp_path / "run", "--max-steps", 1,
               "--batch-size", 2, "--sequence-length", 16, "--eval-every", 1)  # fmt: skip
    code, _, err = opt_lm(*command)
    assert code == 2
    assert "none of 1 documents fell on this side" in err
    assert err.endswith("; or name other data: --validation\n")
    code, out, err = opt_lm(*command, "--validation", tmp_path / "other.txt")
    assert code == 0, err
    assert "validation loss" in out
    assert not (tmp_path / "run" / "data" / "validation").exists()


def test_no_data_and_no_run(opt_lm, tiny, tmp_path):
    code, _, err = opt_lm("train", tiny, tmp_path / "none", "--out", tmp_path / "run")
    assert code == 2
    assert "none" in err
    code, _, err = opt_lm("plot", tmp_path)
    assert code == 2
    assert "expected steps of a run, found none" in err
