"""`opt-lm train` and `opt-lm plot` as users meet them."""

import json

import numpy as np
import pytest

from opt_cli.main import main
from opt_core.data_blocks import write_blocks
from opt_core.run_folder import read_metrics
from opt_torch import OPTForCausalLM, OPTForSequenceClassification
from tests.tiny_folder import save_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def opt_lm(capsys):
    """Runs the command; returns its exit code, stdout and stderr."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            main([str(argument) for argument in arguments])
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def data(tmp_path):
    ids = np.random.default_rng(0).integers(3, 60, 400)
    for name in ("train", "validation"):
        write_blocks(tmp_path / "data" / name, [ids], 16, 60)
    return tmp_path / "data"


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
    pytest.importorskip("matplotlib")
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


def test_no_data_and_no_run(opt_lm, tiny, tmp_path):
    code, _, err = opt_lm("train", tiny, tmp_path / "none", "--out", tmp_path / "run")
    assert code == 2
    assert "none" in err
    code, _, err = opt_lm("plot", tmp_path)
    assert code == 2
    assert "expected steps of a run, found none" in err
