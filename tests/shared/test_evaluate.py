"""Evaluation from end to end: three backends agree, and the commands say what they found."""

import csv
import importlib
import json
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTConfig, OPTTokenizer
from opt_core.evaluation.bias import evaluate_bias, read_comparisons
from opt_core.evaluation.multiple_choice import evaluate_choices, read_items
from opt_core.evaluation.perplexity import text_perplexity
from tests.support import oracle
from tests.support.backends import Backend
from tests.support.command_line import Run
from tests.support.files.tiny_folder import save_model
from tests.support.lm_eval_stand_in import install, request

pytestmark = pytest.mark.dealt

TOLERANCE = 1e-4
"""Of every figure, between backends: what the project promises."""

TEXT = "I like you. The quick brown fox jumps over the lazy dog; the dog sleeps in the world. " * 4


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file in each format."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text(TEXT)
    words = ("dog", "fox", "world", "Hello", "older")
    rows = [{"context": "The", "choices": [f" {w}" for w in words], "label": i} for i in range(5)]
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    labelled = [{"text": f"the {w} sleeps", "label": i % 2} for i, w in enumerate(words)]
    (folder / "labels.jsonl").write_text("\n".join(map(json.dumps, labelled)))
    qa = {
        "id": "a", "question": "Who sleeps?",
        "answers": [{"text": "the dog", "answer_start": TEXT.index("the dog")}],
    }  # fmt: skip
    (folder / "squad.json").write_text(
        json.dumps({"data": [{"paragraphs": [{"context": TEXT, "qas": [qa]}]}]})
    )
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sent_more", "sent_less", "bias_type"])
        writer.writerows([["my dog", "my fox", "age"], ["the world", "the dog", "age"]])
    return folder


def test_every_backend_gives_the_oracles_figures(backend: Backend, tiny: Path, data: Path):
    tokenizer = OPTTokenizer.from_pretrained(tiny)
    model = pytest.importorskip("opt_torch").OPTForCausalLM.from_pretrained(tiny)
    params = {name: value.numpy() for name, value in model.state_dict().items()}

    def by_oracle(ids: Any) -> tuple[Any, Any]:
        logits = oracle.forward(params, model.config, ids).logits[:, :-1]
        picked = np.take_along_axis(oracle.log_softmax(logits), ids[:, 1:, None], -1)[..., 0]
        return picked, logits.argmax(-1) == ids[:, 1:]

    scoring = importlib.import_module(f"opt_{backend.name}.scoring")
    ours = partial(scoring.token_scores, backend.load(tiny))
    _, items = read_items(data / "choices.jsonl")
    format, comparisons = read_comparisons(data / "pairs.csv")
    found, expected = (
        (
            text_perplexity(scores, TEXT, tokenizer, 32, batch_size=2, limit=3).nats_per_token,
            evaluate_choices(scores, tokenizer, items, 64).acc,
            evaluate_choices(scores, tokenizer, items, 64).acc_norm,
            evaluate_bias(scores, tokenizer, comparisons, 64, format).likelihood_difference,
        )
        for scores in (ours, by_oracle)
    )
    pair: Any = found, expected
    np.testing.assert_allclose(*pair, rtol=0, atol=TOLERANCE)


def test_perplexity(opt_lm: Run, tiny: Path, data: Path):
    arguments = ("eval", "perplexity", data / "text.txt", "-m", tiny, "--window", 32)
    report = json.loads(opt_lm(*arguments, "--json").out)
    ids = np.array(OPTTokenizer.from_pretrained(tiny).encode(TEXT))
    rows = ids[: len(ids) // 32 * 32].reshape(-1, 32)
    model = pytest.importorskip("opt_torch").OPTForCausalLM.from_pretrained(tiny)
    nats = np.mean([model(row[None], labels=row[None]).loss.item() for row in rows])
    assert report["perplexity"] == pytest.approx(np.exp(nats), rel=1e-4)
    assert report["windows"] == len(rows)
    code, out, _ = opt_lm(*arguments, "--stride", 16)
    assert code == 0
    assert re.search(rf"tokens +{len(ids) - 1}\n", out)
    assert "bits_per_byte" in out


def test_choices_and_bias(opt_lm: Run, tiny: Path, data: Path):
    out = opt_lm("eval", "multiple-choice", data / "choices.jsonl", "-m", tiny, "--json").out
    report = json.loads(out)
    assert (report["format"], report["items"], report["acc"]) == ("choices", 5, 0.2)
    out = opt_lm("eval", "bias", data / "pairs.csv", "-m", tiny, "--limit", 1, "--json").out
    assert json.loads(out)["pairs"] == 1
    assert "stereotype" in opt_lm("eval", "bias", data / "pairs.csv", "-m", tiny).out


@pytest.mark.filterwarnings("ignore")  # the heads are new, as the warnings say
def test_classes_and_answers(opt_lm: Run, tiny: Path, data: Path, tmp_path: Path):
    for name in ("OPTForSequenceClassification", "OPTForQuestionAnswering"):
        folder = tmp_path / name
        config = OPTConfig.from_pretrained(tiny)
        getattr(pytest.importorskip("opt_torch"), name)(config, seed=0).save_pretrained(folder)
        OPTTokenizer.from_pretrained(tiny).save_pretrained(folder)
    classifier, answerer = sorted(tmp_path.iterdir(), reverse=True)
    arguments = ("eval", "classification", data / "labels.jsonl", "-m", classifier)
    report = json.loads(opt_lm(*arguments, "--json").out)
    assert report["texts"] == np.sum(report["confusion"]) == 5
    assert report["accuracy"] == np.trace(report["confusion"]) / 5
    assert "taken for" in opt_lm(*arguments).out
    answers = tmp_path / "answers.json"
    arguments = ("eval", "qa", data / "squad.json", "-m", answerer, "--predictions", answers)
    report = json.loads(opt_lm(*arguments, "--json", "--max-length", 64, "--stride", 16).out)
    assert report["answers"] == json.loads(answers.read_text())
    assert report["answers"]["a"] in TEXT
    assert "exact_match" in opt_lm(*arguments).out


def test_harness(opt_lm: Run, tiny: Path, monkeypatch: pytest.MonkeyPatch):
    """A task of `lm-eval`, which a few lines stand for here, reaches the model."""
    asked: dict[str, Any] = {}

    def simple_evaluate(lm: Any, **options: Any) -> Any:
        asked.update(options)
        ((value, _),) = lm.loglikelihood([request("The", " dog")])
        (written,) = lm.generate_until([request("The dog", {"until": ["q"], "max_gen_toks": 4})])
        asked["written"] = written
        return {"results": {"mine": {"alias": "mine", "acc,none": value, "sample_len": 1}}}

    class TaskManager:
        def __init__(self, include_path: str | None = None):
            self.all_tasks = ["mine"] if include_path == "tasks" else []

    arguments = ("eval", "harness", "mine", "-m", tiny)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert opt_lm(*arguments).err == "error: harness needs lm-eval: pip install 'opt-lm[lm-eval]'\n"
    install(monkeypatch, simple_evaluate=simple_evaluate, TaskManager=TaskManager)
    assert "lm-eval knows no task mine" in opt_lm(*arguments).err
    arguments = (*arguments, "--include-path", "tasks", "--num-fewshot", 2, "--limit", 3)
    out = json.loads(opt_lm(*arguments, "--json").out)
    assert (asked["tasks"], asked["num_fewshot"], asked["limit"]) == (["mine"], 2, 3)
    model = pytest.importorskip("opt_torch").OPTForCausalLM.from_pretrained(tiny)
    tokenizer = OPTTokenizer.from_pretrained(tiny)
    ids = np.array([tokenizer.encode("The dog")])
    expected = model(ids).logits[0, -2].log_softmax(-1)[ids[0, -1]].item()
    assert out["mine"]["acc,none"] == pytest.approx(expected, rel=1e-4)
    new = model.generate(ids, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
    assert asked["written"] == tokenizer.batch_decode(new)[0].partition("q")[0]
    assert re.search(r"^mine +acc +-", opt_lm(*arguments).out, re.MULTILINE)


def test_prepare(opt_lm: Run, data: Path, tmp_path: Path):
    rows = [json.dumps({"text": f"{i} {TEXT[: 60 + i]} {i * i}"}) for i in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join([*rows, '{"text": ""}']))
    arguments = ("prepare", tmp_path / "a.jsonl", data / "text.txt", tmp_path / "out")
    arguments = (*arguments, "-t", 16, "--validation", 0.3, "--near-duplicates", 1)
    report = json.loads(opt_lm(*arguments, "--processes", 1, "--json").out)
    assert report["documents"] == 32
    assert report["dropped"]["empty"] == 1
    code, out, err = opt_lm(*arguments)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: .*out: already exists; name a new folder\n", err)
    arguments = (*arguments[:3], tmp_path / "other", *arguments[4:], "--processes", 1)
    code, out, err = opt_lm(*arguments)
    assert code == 0
    assert re.search(r"^train +\d+", out, re.MULTILINE)
    assert re.search(r"^empty +1 ", out, re.MULTILINE)
    assert "a.jsonl:31" in "".join(out.split()), "a long path is folded"
    assert "32 documents in 2 files" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "perplexity", "{data}/nowhere.txt"], "nowhere.txt: no such file or folder"),
        (["eval", "perplexity", "{data}/text.txt", "--window", 400], "less than one window of 400"),
        (["eval", "multiple-choice", "{data}/pairs.csv"], "fields of no known format"),
        (["eval", "bias", "{data}/squad.json"], "not laid out as StereoSet's JSON"),
        (["eval", "qa", "{data}/labels.jsonl"], "expected question, context and answers"),
        (["prepare", "{data}/text.txt"], "expected files to read and, last, a folder to write"),
    ],
)
def test_errors_are_one_line(
    opt_lm: Run, tiny: Path, data: Path, arguments: list[str], message: str
):
    given = [str(argument).format(data=data) for argument in arguments]
    code, out, err = opt_lm(*given, "-m", tiny)
    assert (code, out) == (2, "")
    assert message in err
    assert re.fullmatch(r"error: .+\n", err)
