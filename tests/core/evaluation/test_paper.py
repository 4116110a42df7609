"""The paper's tasks without a framework: files found, rows refused, figures shown."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from opt_core import OPTConfig
from opt_core.errors import DataError
from opt_core.evaluation.bias import BiasResult
from opt_core.evaluation.paper import (
    TASKS,
    PaperResult,
    TaskResult,
    find_task_files,
    judge,
    make_prompts,
    model_size,
    published,
    read_docs,
    results_markdown,
    table_rows,
)
from opt_core.evaluation.paper.figures import FIGURES
from opt_core.evaluation.paper.files import BIAS_FILES, TOXICITY_FILES, find_files
from opt_core.evaluation.paper.prompts import Prompt
from opt_core.evaluation.paper.report import bias_rows
from opt_core.evaluation.toxicity import ToxicityResult
from opt_core.presets import PRESETS
from tests.support.files.paper_data import write_hub, write_published

COPA = {"premise": "It fell.", "choice1": "A", "choice2": "B", "question": "cause", "label": 0}


def write_rows(path: Path, *rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("write", [write_published, write_hub])
def test_each_split_of_each_task_is_found_once(write: Any, tmp_path: Path):
    write(tmp_path)
    found: list[Path] = []
    for task in TASKS.values():
        for split in dict.fromkeys((task.split, task.examples)):
            (path,) = find_task_files(tmp_path, task, split)
            found.append(path)
    assert len({*found}) == len(found)


def test_the_hub_s_folders_and_shards(tmp_path: Path):
    for name in ("main", "additional"):
        write_rows(tmp_path / f"openbookqa/{name}/test-00000-of-00001.json", {})
    (found,) = find_task_files(tmp_path, TASKS["openbookqa"], "test")
    assert found.parent.name == "main"
    shards = [
        write_rows(tmp_path / f"hub/super_glue/record/validation-0000{i}-of-00002.json", {})
        for i in range(2)
    ]
    assert find_task_files(tmp_path, TASKS["record"], "validation") == shards
    assert find_task_files(tmp_path / "hub/super_glue/record", TASKS["record"], "validation")
    write_rows(tmp_path / "other/record/val.jsonl", {})
    with pytest.raises(DataError, match=r"which of these is meant\? .*val.jsonl"):
        find_task_files(tmp_path, TASKS["record"], "validation")
    with pytest.raises(DataError, match="no such folder"):
        find_task_files(tmp_path / "none", TASKS["record"], "validation")
    write_rows(tmp_path / "crows_pairs_anonymized.csv")
    write_rows(tmp_path / "StereoSet-master/data/dev.json")
    write_rows(tmp_path / "realtoxicityprompts-data/prompts.jsonl")
    for patterns in (*BIAS_FILES.values(), TOXICITY_FILES):
        assert len(find_files(tmp_path, patterns)) == 1


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("copa", {"label": "first"}, "val.jsonl:1: expected a number, found 'first'"),
        ("copa", {"label": 0}, "COPA, row 1: not laid out as its public files: KeyError"),
        ("copa", {**COPA, "label": -1}, "a split without labels cannot be evaluated"),
        ("copa", {**COPA, "question": "why"}, r"COPA, row 1: .*KeyError\('why'\)"),
        ("cb", {"label": "maybe"}, "label 'maybe': expected one of entailment, contradiction"),
        ("rte", {"premise": "a"}, "val.jsonl:1: expected a field 'label', found 'premise'"),
        ("multirc", {"passage": {"text": "a"}}, "expected a field 'questions', found 'text'"),
        ("record", {"passage": "a", "query": "b"}, "not laid out as ReCoRD's rows: KeyError"),
        ("wsc", {"text": "a b", "label": 1, "span1_text": "a", "span1_index": 7}, "expected 0..1"),
    ],
)
def test_rows_of_another_layout_are_refused(task: str, row: Any, message: str, tmp_path: Path):
    path = write_rows(tmp_path / task / "val.jsonl", row)
    with pytest.raises(DataError, match=message):
        make_prompts(TASKS[task], read_docs(TASKS[task], [path]))


def test_letters_and_labels_beside(tmp_path: Path):
    row = {"question": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "E"}
    path = write_rows(tmp_path / "ARC-Easy-Test.jsonl", row)
    with pytest.raises(DataError, match="answerKey 'E': expected one of A"):
        read_docs(TASKS["arc_easy"], [path])
    goal = {"goal": "a", "sol1": "b", "sol2": "c"}
    path = write_rows(tmp_path / "dev.jsonl", goal, goal)
    (tmp_path / "dev-labels.lst").write_text("1\n")
    assert read_docs(TASKS["piqa"], [path], limit=1) == [{**goal, "label": 1}]
    with pytest.raises(DataError, match=r"dev.jsonl:2: expected a label for each row, found 1"):
        read_docs(TASKS["piqa"], [path])
    path = tmp_path / "WSCollection.xml"
    path.write_text("<collection><schema><text><pron>it</pron></text></schema></collection>")
    with pytest.raises(DataError, match=r"WSCollection.xml:\[1\]: expected text with a pron"):
        read_docs(TASKS["winograd"], [path])
    path.write_text("<collection>")
    with pytest.raises(DataError, match="cannot be read as XML"):
        read_docs(TASKS["winograd"], [path])


def test_spans_that_do_not_occur_are_mended(tmp_path: Path):
    row = {
        "text": "the dog saw Ann and\nBob smiled", "label": True,
        "target": {"span1_text": "The dog.", "span1_index": 0, "span2_text": "Ann and Bob",
                   "span2_index": 3},
    }  # fmt: skip
    (doc,) = read_docs(TASKS["wsc"], [write_rows(tmp_path / "val.jsonl", row)])
    assert (doc["span1_text"], doc["span2_text"], doc["label"]) == ("the dog", "Ann and Bob", 1)


def test_examples_are_drawn_without_the_question():
    docs = [{**COPA, "premise": f"Thing {i} fell.", "choice1": f"Cause {i}"} for i in range(5)]
    prompts = make_prompts(TASKS["copa"], docs, 2, docs)
    drawn = random.Random(1234)
    for doc, prompt in zip(docs, prompts, strict=True):
        *shown, question = prompt.contexts[0].split("\n\n")
        wanted = [d for d in drawn.sample(docs, 3) if d != doc][:2]
        assert shown == [
            f"{d['premise'][:-1]} because  {d['choice1'].replace('C', 'c')}" for d in wanted
        ]
        assert question == f"{doc['premise'][:-1]} because"
    with pytest.raises(DataError, match="COPA: 5 examples: expected at least 6 rows of its train"):
        make_prompts(TASKS["copa"], docs, 5, docs)


def test_figures_of_a_task():
    """Two of three right; per character, one."""
    prompts = [Prompt(("c",) * 2, (" a", " bcde"), (1, 4), label, "") for label in (0, 1, 1)]
    scores = [[-1.0, -2.0], [-3.0, -2.0], [-1.0, -3.0]]
    result = judge(TASKS["piqa"], prompts, scores, 3)
    assert result.acc == pytest.approx(2 / 3)
    assert result.acc_error == pytest.approx((2 / 9 / 2) ** 0.5)
    assert result.acc_norm == pytest.approx(2 / 3)
    assert (result.shots, result.items, result.chance, result.f1) == (3, 3, 0.5, None)


def test_published_figures_are_of_official_sizes():
    assert all(size in PRESETS for sizes in FIGURES.values() for size in sizes)
    assert {*FIGURES} - {*TASKS} == {*BIAS_FILES}
    for name in PRESETS:
        expected = name if name.startswith("opt-") else None
        assert model_size(OPTConfig.from_preset(name)) == expected
    assert model_size(OPTConfig.from_preset("opt-125m").replace(vocab_size=1000)) is None
    found = published("piqa", "opt-125m")
    assert found is not None
    assert (found.percent, found.metric) == (62.02, "acc_norm")
    assert published("piqa", "opt-125m", shots=1) is None
    assert published("piqa", None) is None
    assert published("boolq", "opt-125m") is None


def test_tables_and_markdown():
    result = PaperResult(
        "mine", "opt-175b",
        tasks=[
            TaskResult("piqa", 0, 10, 0.5, 0.1, 0.6, None, 0.5),
            TaskResult("cb", 0, 4, 0.25, 0.2, None, 0.1, 1 / 3),
        ],
        bias=[
            BiasResult("crows-pairs", 9, 60.0, None, None, 1.0, {"age": 55.0}),
            BiasResult("stereoset", 9, 52.0, 80.0, 76.8, 1.0),
        ],
        toxicity=ToxicityResult("judge", 3, 25, {"all": {"mean": 0.25}}),
    )  # fmt: skip
    blank = "\N{EN DASH}"
    assert table_rows(result) == [
        ("PIQA", "10", "50.0", "10.0", "60.0*", blank, "50.0", "81.1"),
        ("CB", "4", "25.0", "20.0", blank, "10.0", "33.3", blank),
    ]
    rows = {name: (value, other) for name, value, other in bias_rows(result)}
    assert rows["CrowS-Pairs: stereotype likelier %"] == ("60.0", "69.5")
    assert rows["StereoSet: ICAT"] == ("76.8", "60.0")
    assert rows["RealToxicityPrompts, all prompts: mean"] == ("0.250", blank)
    text = results_markdown(result)
    assert r"| PIQA | 10 | 50.0 | 10.0 | 60.0\* |" in text
    assert "Published by: GPTQ, arXiv 2210.17323." in text
    assert "Toxicity is what judge says of 25 continuations" in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("Not measured: HellaSwag, StoryCloze, ARC (easy)")
    assert not {"PIQA", "CB", "CrowS-Pairs", "StereoSet", "RealToxicityPrompts"} & {
        *last.removeprefix("Not measured: ").rstrip(".").split(", ")
    }
    assert all(not line.startswith(("# ", "## ")) for line in text.splitlines())
    assert results_markdown(PaperResult("x")).startswith("Not measured: HellaSwag")
