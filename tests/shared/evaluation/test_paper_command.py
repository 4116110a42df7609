"""`opt-lm eval paper` from end to end, on made-up files in the public formats."""

import csv
import importlib
import json
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from opt_core import OPTConfig, OPTTokenizer
from opt_core.evaluation.paper import TASKS
from opt_core.evaluation.toxicity import evaluate_toxicity, read_toxicity_prompts
from opt_core.hub import resolve
from tests.support.backends import Backend
from tests.support.command_line import Run
from tests.support.files.paper_data import hub_rows, write_published
from tests.support.files.tiny_folder import save_model
from tests.support.lm_eval_tasks import local_task

TOLERANCE = 1e-4
"""Of every figure, between backends: what the project promises."""
MINI = resolve("mini")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The paper's files, all made up."""
    folder = tmp_path_factory.mktemp("data")
    write_published(folder)
    with (folder / "crows_pairs_anonymized.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sent_more", "sent_less", "bias_type"])
        writer.writerows([["my dog", "my fox", "age"], ["the world", "the dog", "age"]])
    texts = ("A dog sleeps.", "A fox sleeps.", "Sleeps stone a.")
    sentences = [
        {"sentence": text, "gold_label": label}
        for text, label in zip(texts, ("stereotype", "anti-stereotype", "unrelated"), strict=True)
    ]
    entry = {"target": "dog", "bias_type": "race", "context": "BLANK", "sentences": sentences}
    (folder / "StereoSet").mkdir()
    (folder / "StereoSet/dev.json").write_text(json.dumps({"data": {"intrasentence": [entry]}}))
    prompts = [{"prompt": {"text": f"The dog {i}", "toxicity": i / 4}} for i in range(4)]
    (folder / "realtoxicityprompts-data").mkdir()
    (folder / "realtoxicityprompts-data/prompts.jsonl").write_text(
        "\n".join(map(json.dumps, prompts))
    )
    return folder


@pytest.fixture
def paper(opt_lm: Run) -> Run:
    return lambda *arguments: opt_lm("eval", "paper", *arguments)


def test_everything_on_files(
    paper: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "judge.py").write_text(
        "def score(texts):\n    return [len(text) % 10 / 10 for text in texts]\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", data, "--limit", 2, "--classifier", "judge:score")
    picture, card = tmp_path / "paper.svg", tmp_path / "README.md"
    code, out, err = paper(*arguments, "--plot", picture, "--card", tmp_path)
    assert (code, err) == (0, "")
    for task in TASKS.values():
        assert f"\n{task.title} " in "\n" + out
        assert task.title in card.read_text()
    assert "ICAT" in out
    assert "RealToxicityPrompts: prompts" in out
    assert "Not measured" not in card.read_text()
    assert "zero-shot" in picture.read_text()
    found = json.loads(paper(*arguments, "--json").out)
    assert [one["task"] for one in found["tasks"]] == [*TASKS]
    assert {one["items"] for one in found["tasks"]} == {2}
    assert [one["format"] for one in found["bias"]] == ["crows-pairs", "stereoset"]
    assert (found["toxicity"]["prompts"], found["toxicity"]["samples"]) == (2, 25)


def test_what_is_missing_is_said(paper: Run, data: Path, tmp_path: Path):
    (tmp_path / "copa").mkdir()
    copied = (data / "SuperGLUE/COPA/val.jsonl").read_text()
    (tmp_path / "copa/val.jsonl").write_text(copied)
    code, out, err = paper("--data", tmp_path)
    assert code == 0
    assert "COPA" in out
    assert f"not measured: BoolQ: no file of its validation split in {tmp_path}" in err
    assert f"not measured: StereoSet: no file of it in {tmp_path}" in err
    assert paper("boolq", "--data", tmp_path).err == (
        f"error: boolq: no file of its validation split in {tmp_path}\n"
    )
    err = paper("copa", "--data", tmp_path, "--shots", 1).err
    assert err == f"error: copa: no file of its train split in {tmp_path}\n"
    assert "unknown task mine: expected some of hellaswag," in paper("mine").err
    assert f"--data {tmp_path / 'no'}: no such folder" in paper("--data", tmp_path / "no").err
    (tmp_path / "copa/val.jsonl").unlink()
    assert "nothing to measure: no file of its" in paper("--data", tmp_path).err
    assert "stereoset: needs --data" in paper("stereoset").err
    err = paper("real_toxicity_prompts", "--data", data).err
    assert err == "error: real_toxicity_prompts: needs --classifier, which judges toxicity\n"


@pytest.mark.parametrize(("name", "shots"), [("copa", 2), ("cb", 0), ("multirc", 0)])
def test_through_the_harness_is_as_on_files(
    name: str, shots: int, paper: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The harness' own tasks, their data made up here as well: the same figures."""
    tasks = importlib.import_module("lm_eval.tasks")
    through = importlib.import_module("opt_core.evaluation.paper.harness")
    # Its list of all tasks takes long to make; its task is given as an object.
    manager = tasks.TaskManager(include_defaults=False)
    monkeypatch.setattr(through, "_manager", lambda: manager)
    task = local_task(TASKS[name].lm_eval, hub_rows()[name], tmp_path, shots)
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], lm_eval=task))
    arguments = (name, "--shots", shots, "--json")
    (found,) = json.loads(paper(*arguments).out)["tasks"]
    (expected,) = json.loads(paper(*arguments, "--data", data).out)["tasks"]
    found["chance"] = expected["chance"]  # the harness does not say
    assert found == pytest.approx(expected)
    monkeypatch.setitem(TASKS, name, replace(TASKS[name], lm_eval="none_such"))
    code, _, err = paper(name)
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {name}: lm-eval cannot run")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "opt_core.evaluation.paper.harness", None)
    assert "without --data, paper needs lm-eval: pip install" in paper(name).err


@pytest.mark.filterwarnings("ignore")  # the head is new, as the warning says
def test_toxicity_by_a_classifier_of_ours(backend: Backend, paper: Run, data: Path, tmp_path: Path):
    """Its probability of "toxic" is what counts, on every backend the same."""
    folder = save_model(tmp_path / "judge")
    config = OPTConfig.from_pretrained(folder).replace(id2label={0: "fine", 1: "Toxic"})
    made = pytest.importorskip("opt_torch").OPTForSequenceClassification(config, seed=0)
    made.save_pretrained(folder)
    load_classifier = importlib.import_module("opt_cli.paper.classifiers").load_classifier
    score = load_classifier(str(folder), backend.name, batch_size=2)
    texts = ["the dog", "I like you.", "the world sleeps in the world"]
    tokenizer = OPTTokenizer.from_pretrained(folder)
    expected = [
        made(np.array([tokenizer.encode(text)])).logits.softmax(-1)[0, 1].item() for text in texts
    ]
    assert score(texts) == pytest.approx(expected, abs=TOLERANCE)
    writer = backend.load(save_model(tmp_path / "writer"))
    prompts = read_toxicity_prompts(data / "realtoxicityprompts-data/prompts.jsonl")
    result = evaluate_toxicity(
        writer.generate, tokenizer, score, prompts, config.max_position_embeddings,
        samples=3, batch_size=4,
    )  # fmt: skip
    assert (result.prompts, result.samples) == (4, 3)
    assert 0 < result.kinds["all"]["mean"] < result.kinds["all"]["expected_maximum"] < 1
    again = partial(
        evaluate_toxicity, writer.generate, tokenizer, score, prompts,
        config.max_position_embeddings, samples=3, batch_size=4,
    )  # fmt: skip
    assert asdict(again()) == asdict(result)
    assert again(seed=1) != result


def test_classifiers_that_cannot_judge(paper: Run, data: Path, tmp_path: Path):
    arguments = ("real_toxicity_prompts", "--data", data, "--classifier")
    assert "no_such_module" in paper(*arguments, "no_such_module:score").err
    assert "json has no function 'score'" in paper(*arguments, "json:score").err
    folder = save_model(tmp_path / "judge")
    made = pytest.importorskip("opt_torch").OPTForSequenceClassification
    made(OPTConfig.from_pretrained(folder), seed=0).save_pretrained(folder)
    err = paper(*arguments, folder).err
    assert "expected a label 'toxic', found label_0, label_1" in err.lower()
