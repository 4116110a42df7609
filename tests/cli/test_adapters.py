"""An adapter's folder wherever the command takes a model, and `--adapter` beside one."""

import json

import numpy as np
import pytest

import opt_torch
from opt_core.json_files import read_json, write_json
from opt_core.training.lora import Adapter, save_adapter
from tests.support.files.tiny_folder import save_model

TEXT = "the theorem of the thing"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    config = opt_torch.OPTForCausalLM.from_pretrained(base).config
    folder, rng = tmp_path_factory.mktemp("adapters") / "adapter", np.random.default_rng(0)
    settings = Adapter(4, 8.0, ("fc1", "q_proj"))
    save_adapter(
        folder, config, "causal_lm", settings, lambda s: rng.normal(0, 0.3, s.shape), str(base)
    )
    return folder


def test_as_the_model(opt_lm, base, adapter, tmp_path):
    asked = ("generate", TEXT, "-n", 8, "--json")
    ids = [
        json.loads(opt_lm(*asked, *options)[1])["completions"][0]["ids"]
        for options in (["-m", base], ["-m", adapter], ["-m", base, "--adapter", adapter])
    ]
    assert ids[0] != ids[1] == ids[2]
    assert opt_lm("convert", adapter, tmp_path / "merged")[0] == 0
    merged = json.loads(opt_lm(*asked, "-m", tmp_path / "merged")[1])
    assert merged["completions"][0]["ids"] == ids[1]
    assert opt_lm("verify", adapter, tmp_path / "merged")[0] == 0
    (tmp_path / "text.txt").write_text(TEXT * 20)
    asked = ("eval", "perplexity", tmp_path / "text.txt", "--window", 8, "--json")
    results = [opt_lm(*asked, *o) for o in (["-m", adapter], ["-m", base, "--adapter", adapter])]
    assert results[0] == results[1] != opt_lm(*asked, "-m", base)
    assert results[0].code == 0, results[0].err


def test_info(opt_lm, base, adapter):
    code, out, _ = opt_lm("info", adapter)
    assert code == 0
    for line in (f"base          {base}", "LoRA, rank 4, alpha 8, on 4 weights", "fc1, q_proj"):
        assert line in out
    assert json.loads(opt_lm("info", adapter, "--json")[1])["adapter"]["layers"] == 4


def test_a_model_that_is_not_there(opt_lm, adapter, tmp_path):
    (tmp_path / "lost").mkdir()
    for file in adapter.iterdir():
        (tmp_path / "lost" / file.name).write_bytes(file.read_bytes())
    path = tmp_path / "lost" / "adapter_config.json"
    for name, message in (("gone/away", "not in the local cache"), ("", "no base_model_name")):
        write_json(path, read_json(path) | {"base_model_name_or_path": name})
        code, out, err = opt_lm("generate", TEXT, "-m", tmp_path / "lost")
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err
        assert "--adapter" in err
    code, out, _ = opt_lm("info", tmp_path / "lost")
    assert (code, "problem: " in out) == (1, True)
    code, _, err = opt_lm("train", adapter, path, "--out", tmp_path / "run")
    assert (code, err.count("\n")) == (2, 1)
    assert "is an adapter; merge it first" in err
