"""Labelled texts: rows of a file to padded examples; labels that are no class are refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.data.batches import Batches
from opt_core.data.classification import encode_labelled_texts, read_labelled_texts
from opt_core.errors import DataError
from tests.support.small_tokenizer import write_opt_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(text: str, label: Any) -> dict[str, Any]:
    return {"text": text, "label": label}


@pytest.mark.parametrize(
    ("labels", "names", "numbers", "known"),
    [
        (["b", "a", "b"], None, [1, 0, 1], ("a", "b")),
        (["b", "a", "b"], ["b", "x", "a"], [0, 2, 0], ("b", "x", "a")),
        ([2, 0, 1], None, [2, 0, 1], ("LABEL_0", "LABEL_1", "LABEL_2")),
        (["1", "0", "1"], None, [1, 0, 1], ("LABEL_0", "LABEL_1")),
        ([1, 0, 1], ["no", "yes"], [1, 0, 1], ("no", "yes")),
        (["1", "0", "1"], ["1", "0"], [0, 1, 0], ("1", "0")),
    ],
)
def test_labels_are_names_or_numbers(
    tmp_path: Path, labels: list[Any], names: Any, numbers: list[int], known: tuple[str, ...]
):
    path = write(tmp_path, *(row(f"t{i}", label) for i, label in enumerate(labels)))
    data = read_labelled_texts(path, names)
    assert (data.labels, data.label_names, data.texts) == (numbers, known, ["t0", "t1", "t2"])
    assert read_labelled_texts(path, known, limit=2).labels == numbers[:2]


@pytest.mark.parametrize(
    ("rows", "names", "message"),
    [
        ([], None, "is empty"),
        ([row("x", 2)], ["a", "b"], r"rows.jsonl:1: label 2: expected a class number 0\.\.1"),
        ([row("x", 0), row("x", -1)], ["a", "b"], r"rows.jsonl:2: label -1: expected"),
        ([row("x", "c")], ["a", "b"], "rows.jsonl:1: label 'c' is none of a, b"),
        ([row("x", -1), row("x", 1)], None, "expected class numbers from 0, found -1"),
        ([row("x", 0), row("x", 2)], None, "found 2 among 2 rows: more classes than rows"),
        ([row("x", 1), row("x", "a")], None, "some labels are names and some are numbers"),
        ([row("x", "a"), row("y", "a")], None, "expected at least two classes, found a alone"),
        ([row("x", True)], None, "expected a class's name or number, found bool"),
        ([row("x", None)], None, "expected a class's name or number, found NoneType"),
        ([row(" ", 0)], None, "rows.jsonl:1: 'text' is empty"),
        ([row(5, 0)], None, "'text': expected a string, found int"),  # type: ignore[arg-type]
        ([{"label": 0}], None, "expected a field 'text', found 'label'"),
        ([{"text": "x"}], None, "expected a field 'label', found 'text'"),
    ],
)
def test_bad_rows_are_refused_in_one_line(tmp_path: Path, rows: Any, names: Any, message: str):
    with pytest.raises(DataError, match=message) as error:
        read_labelled_texts(write(tmp_path, *rows), names)
    assert "\n" not in str(error.value)


def test_examples_are_padded_rows(tmp_path: Path, tokenizer: OPTTokenizer):
    texts = ["dog", "the quick brown fox", "x" * 50]
    path = write(tmp_path, *(row(text, i % 2) for i, text in enumerate(texts)))
    data = read_labelled_texts(path)
    examples = encode_labelled_texts(data, tokenizer, 30)
    assert {e["input_ids"].shape for e in examples} == {(30,)}
    for text, example in zip(texts, examples, strict=True):
        ids = tokenizer.encode(text)[:30]
        assert example["input_ids"][: len(ids)].tolist() == ids
        assert set(example["input_ids"][len(ids) :].tolist()) <= {1}
        assert example["attention_mask"].sum() == len(ids)
    short = encode_labelled_texts(read_labelled_texts(path, limit=2), tokenizer, 512)
    longest = len(tokenizer.encode(texts[1]))
    assert short[0]["input_ids"].shape == (longest + -longest % 8,)
    batch = next(Batches(examples, 3, 0, shuffle=False))
    assert batch["labels"].tolist() == [0, 1, 0]
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == np.int32


def test_pairs_follow_one_another(tmp_path: Path, tokenizer: OPTTokenizer):
    path = write(tmp_path, {"a": "dog", "b": "fox", "y": 0}, {"a": "x", "b": "y", "y": 1})
    data = read_labelled_texts(path, None, "a", "y", "b")
    ids = encode_labelled_texts(data, tokenizer, 64)[0]["input_ids"].tolist()
    both = tokenizer.encode("dog") + tokenizer.encode("fox")
    assert ids[: len(both)] == both
