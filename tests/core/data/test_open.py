"""Training data as users have it: prepared or not, labelled, questions; and what is refused."""

import json
import warnings
from pathlib import Path

import numpy as np
import pytest

from opt_core import OPTConfig, OPTTokenizer, TrainConfig
from opt_core.data import Batches, DataConfig, TokenBlocks, open_data, prepare, write_blocks
from opt_core.data.open import Task
from opt_core.errors import DataError
from opt_core.hub import resolve

MINI = resolve("mini")
MODEL = OPTConfig.from_pretrained(MINI)
CONFIG = TrainConfig(sequence_length=16)
VALIDATED = CONFIG.replace(eval_every=1)


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(MINI)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A hundred documents, one to a line of JSON."""
    rows = [{"text": f"The {i} quick brown foxes jump over {i} lazy dogs."} for i in range(100)]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def labelled(path: Path, *labels: str) -> Path:
    rows = [{"text": f"the {label}", "label": label} for label in labels]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(path: Path, *texts: str) -> Path:
    """A file in SQuAD's layout: who sleeps, and these texts for answers."""
    context = "A cat and a dog sleep."
    questions = [
        {"id": str(i), "question": "Who?", "answers": [{"text": text, "answer_start": 6}]}
        for i, text in enumerate(texts)
    ]
    path.write_text(
        json.dumps({"data": [{"paragraphs": [{"context": context, "qas": questions}]}]})
    )
    return path


def rows(blocks) -> np.ndarray:
    return np.stack([blocks[i] for i in range(len(blocks))])


def test_text_is_prepared_once(text, tokenizer, tmp_path):
    """In the run's folder, where the same call finds it again; progress is told meanwhile."""
    told = []
    opened = open_data(
        text, "text", MODEL, CONFIG, tokenizer=tokenizer, folder=tmp_path / "run",
        progress=lambda *progress: told.append(progress),
    )  # fmt: skip
    assert opened.validation is None
    assert opened.model_config == MODEL
    assert told[-1] == (text.stat().st_size, text.stat().st_size, f"preparing {text}")
    reference = tmp_path / "reference"
    prepare([text], reference, tokenizer, DataConfig(16, 0))
    for blocks in (opened.train, TokenBlocks.open(tmp_path / "run" / "data" / "train")):
        np.testing.assert_array_equal(rows(blocks), rows(TokenBlocks.open(reference / "train")))
    text.unlink()
    text.touch()  # it would be refused, were it read again
    again = open_data(text, "text", MODEL, CONFIG, folder=tmp_path / "run")
    assert len(again.train) == len(opened.train)
    assert next(Batches(again.train, 4, seed=0))["input_ids"].shape == (4, 16)


def test_text_is_split_where_validations_are_asked_for(text, tokenizer, tmp_path):
    opened = open_data(text, "text", MODEL, VALIDATED, tokenizer=str(MINI), folder=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "data" / "report.json").read_text())
    assert 0 < report["splits"]["validation"]["documents"] < 20
    assert opened.validation is not None
    assert len(opened.validation) == report["splits"]["validation"]["blocks"]


def test_text_validated_on_another_file(text, tokenizer, tmp_path):
    """Nothing is held out of either."""
    opened = open_data(text, "text", MODEL, VALIDATED, text, tokenizer, tmp_path / "run")
    assert opened.validation is not None
    assert len(opened.validation) == len(opened.train)
    assert not (tmp_path / "run" / "data" / "validation").exists()


def test_prepared_text_needs_no_tokenizer(text, tokenizer, tmp_path):
    """The whole folder, or one split of it, or both by name."""
    prepare([text], tmp_path / "data", tokenizer, DataConfig(16, 0.2))
    train, validation = (tmp_path / "data" / name for name in ("train", "validation"))
    for data, given, expected in (
        (tmp_path / "data", None, validation),
        (train, None, None),
        (train, validation, validation),
        (tmp_path / "data", train, train),
    ):
        opened = open_data(data, "text", MODEL, CONFIG, validation=given)
        assert len(opened.train) == len(TokenBlocks.open(train))
        if expected is None:
            assert opened.validation is None
        else:
            assert opened.validation is not None
            assert len(opened.validation) == len(TokenBlocks.open(expected))


def test_classification_takes_its_labels_from_the_training_data(tokenizer, tmp_path):
    data = labelled(tmp_path / "train.jsonl", "dog", "cat", "cow", "cat")
    other = labelled(tmp_path / "other.jsonl", "cow", "cow")
    opened = open_data(data, "classification", MODEL, CONFIG, other, tokenizer)
    assert opened.model_config.id2label == {0: "cat", 1: "cow", 2: "dog"}
    assert opened.model_config.num_labels == 3
    assert opened.model_config.problem_type == "single_label_classification"
    assert [int(opened.train[i]["labels"]) for i in range(4)] == [2, 0, 1, 0]
    assert opened.validation is not None
    assert [int(opened.validation[i]["labels"]) for i in range(2)] == [1, 1]
    labelled(other, "cow", "goat")
    with pytest.raises(DataError, match=r"other\.jsonl.*'goat' is none of cat, cow, dog"):
        open_data(data, "classification", MODEL, CONFIG, other, tokenizer)


def test_questions_are_cut_into_windows_and_what_is_left_out_is_noted(tokenizer, tmp_path):
    data = asked(tmp_path / "train.json", "and", "dog")
    config, noted = CONFIG.replace(sequence_length=48), []
    opened = open_data(data, "qa", MODEL, config, data, tokenizer, note=noted.append)
    assert noted == [f"{data}: 1 questions left out: answer is not where it should start"] * 2
    assert opened.model_config == MODEL
    assert len(opened.train) == 1
    assert opened.train[0]["start_positions"] <= opened.train[0]["end_positions"]
    assert opened.validation is not None
    assert len(opened.validation) == 1
    with pytest.warns(UserWarning, match="1 questions left out") as caught:
        open_data(data, "qa", MODEL, config, tokenizer=tokenizer)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        open_data(asked(data, "and"), "qa", MODEL, config, tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.txt", b"", "data.txt: is empty"),
        ("data.txt", b"\x7fELF\0\0", "data.txt: binary data, not text"),
        ("data.txt", b"one two", r"data.txt: train: \d+ tokens fill no block of 16"),
        ("data.jsonl", b'{"text": "a", "label": -1}', "data.jsonl: labels: expected class numbers"),
        ("data.json", b"{}", "data.json: expected SQuAD's JSON"),
    ],
)
def test_bad_files_are_named_and_leave_no_folder(tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    tasks: dict[str, Task] = {".txt": "text", ".jsonl": "classification", ".json": "qa"}
    with pytest.raises(DataError, match=message):
        open_data(path, tasks[path.suffix], MODEL, CONFIG, None, tokenizer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_text_of_one_document_cannot_be_split(tokenizer, tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(" ".join(f"{i} quick foxes and a dog," for i in range(40)))
    message = r"none of 1 documents .*; or name other data: validation$"
    with pytest.raises(DataError, match=message):
        open_data(path, "text", MODEL, VALIDATED, tokenizer=tokenizer, folder=tmp_path / "run")


def test_what_does_not_fit_is_refused(tokenizer, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("A text.")
    with pytest.raises(
        DataError, match="task: expected text, classification, qa, received 'pairs'"
    ):
        open_data(text, "pairs", MODEL, CONFIG)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="none: no such file or folder"):
        open_data(tmp_path / "none", "text", MODEL, CONFIG)
    for task in ("classification", "qa"):
        with pytest.raises(DataError, match=r"none\.jsonl: "):
            open_data(tmp_path / "none.jsonl", task, MODEL, CONFIG, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"text\.txt: no tokenizer to read it with"):
        open_data(text, "text", MODEL, CONFIG, folder=tmp_path / "run")
    with pytest.raises(DataError, match="prepared text, or a folder to prepare a file in"):
        open_data(text, "text", MODEL, CONFIG, tokenizer=tokenizer)
    write_blocks(tmp_path / "blocks", [np.arange(64)], 16, MODEL.vocab_size + 1)
    with pytest.raises(DataError, match="another tokenizer"):
        open_data(tmp_path / "blocks", "text", MODEL, CONFIG)
    write_blocks(tmp_path / "short", [np.arange(64)], 8, 64)
    with pytest.raises(DataError, match="short: blocks of 8 tokens, sequence_length is 16"):
        open_data(tmp_path / "short", "text", MODEL, CONFIG)
    assert not (tmp_path / "run").exists()
