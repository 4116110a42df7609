"""Multiple choice on the public data sets' own rows, and bias on CrowS-Pairs' and StereoSet's."""

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.errors import DataError
from opt_core.evaluation.bias import evaluate_bias, read_comparisons
from opt_core.evaluation.multiple_choice import Item, evaluate_choices, read_items
from tests.support.small_tokenizer import write_opt_folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


class Likes:
    """A model to which some pieces of text are dear: each of their tokens costs less."""

    def __init__(self, tokenizer: OPTTokenizer, *liked: str) -> None:
        self.tokens = {
            i for text in liked for i in tokenizer.encode(text, add_special_tokens=False)
        }

    def __call__(self, ids: Any) -> tuple[Any, Any]:
        is_liked = np.isin(ids[:, 1:], list(self.tokens))
        return np.where(is_liked, -1.0, -2.0).astype(np.float32), is_liked


ROWS: dict[str, tuple[dict[str, Any], Item]] = {
    "lambada": (
        {"text": "the dog saw the quick fox\n"},
        Item("the dog saw the quick", (" fox",), 0),
    ),
    "piqa": (
        {"goal": "To sleep", "sol1": "lie down", "sol2": "jump", "label": 0},
        Item("Question: To sleep\nAnswer:", (" lie down", " jump"), 0),
    ),
    "hellaswag": (
        {
            "ind": 4, "activity_label": "Dogs", "ctx_a": "A dog runs.", "ctx_b": "the fox",
            "ctx": "A dog runs. the fox", "endings": ["jumps [step] over.", "sleeps.  [title] So"],
            "label": "1",
        },
        Item("Dogs: A dog runs. The fox", (" jumps over.", " sleeps. . So"), 1),
    ),
    "arc": (
        {
            "question": {
                "stem": "Who?",
                "choices": [{"text": "dog", "label": "A"}, {"text": "fox", "label": "B"}],
            },
            "choices": None, "answerKey": "B",
        },
        Item("Question: Who?\nAnswer:", (" dog", " fox"), 1),
    ),
    "choices": (
        {"context": "The", "choices": [" dog", " fox", " world"], "label": 2},
        Item("The", (" dog", " fox", " world"), 2),
    ),
}  # fmt: skip


def write(folder: Path, *rows: Any) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("name", ROWS)
def test_a_format_is_known_from_its_fields(tmp_path: Path, name: str):
    row, item = ROWS[name]
    assert read_items(write(tmp_path, row, row)) == (name, [item, item])
    assert read_items(write(tmp_path, row, row), limit=1) == (name, [item])


def test_the_datasets_librarys_layout_of_arc_is_the_same(tmp_path: Path):
    row = {"question": "Who?", "choices": {"text": ["dog", "fox"], "label": ["1", "2"]}}
    path = write(tmp_path, row | {"answerKey": "2"})
    assert read_items(path) == ("arc", [ROWS["arc"][1]])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "x"}, "rows.jsonl:1: fields of no known format .* 'body'"),
        ({"text": "word"}, "'text' has no last word to predict from others"),
        ({"text": 5}, "'text': expected a string, found int"),
        (ROWS["piqa"][0] | {"label": 2}, r"label 2: expected 0\.\.1, one of the choices"),
        (ROWS["piqa"][0] | {"label": -1}, r"label -1: expected 0\.\.1"),
        (ROWS["piqa"][0] | {"label": "x"}, "'label': expected a number, found 'x'"),
        ({"goal": "x", "sol1": "y", "sol2": "z"}, "expected a field 'label'"),
        (ROWS["hellaswag"][0] | {"endings": []}, "'endings': expected a list of strings"),
        (ROWS["arc"][0] | {"answerKey": "Z"}, "not laid out as ARC's questions"),
    ],
)
def test_bad_rows_are_refused_in_one_line(tmp_path: Path, row: Any, message: str):
    with pytest.raises(DataError, match=message) as error:
        read_items(write(tmp_path, row))
    assert "\n" not in str(error.value)


def test_accuracies(tokenizer: OPTTokenizer):
    likes = Likes(tokenizer, " dog")
    items = [
        Item("The", (" dog", " fox"), 0),  # right both ways
        Item("The", (" fox", " dog"), 0),  # wrong both ways
        # Many liked tokens cost more than few others, but not for each of their characters.
        Item("The", (" dog" * 9, " fox"), 0),
        Item("The", (" fox", " world", " dog"), 2),
    ]
    costs = [
        [
            sum(
                1 if t in likes.tokens else 2
                for t in tokenizer.encode(choice, add_special_tokens=False)
            )
            for choice in item.choices
        ]
        for item in items
    ]
    lengths = [[len(choice) - 1 for choice in item.choices] for item in items]
    plain = [np.argmin(c) == i.label for c, i in zip(costs, items, strict=True)]
    normal = [
        np.argmin(np.divide(c, n)) == i.label for c, n, i in zip(costs, lengths, items, strict=True)
    ]
    assert plain != normal
    result = evaluate_choices(likes, tokenizer, items, 64, "choices", 3)
    assert result.acc == np.mean(plain)
    assert result.acc_norm == np.mean(normal)
    assert result.acc_error == pytest.approx(np.std(plain, ddof=1) / 2)
    assert (result.items, result.perplexity) == (4, None)


def test_lambada_asks_for_the_whole_word(tokenizer: OPTTokenizer):
    items = [Item("The quick brown", (" dog",), 0), Item("The lazy", (" fox",), 0)]
    result = evaluate_choices(Likes(tokenizer, " dog"), tokenizer, items, 64, "lambada")
    assert (result.acc, result.acc_norm) == (0.5, None)
    fox = tokenizer.encode(" fox", add_special_tokens=False)
    dog = tokenizer.encode(" dog", add_special_tokens=False)
    nats = len(dog) + sum(1 if t in dog else 2 for t in fox)
    assert result.perplexity == pytest.approx(math.exp(nats / 2))


def test_crows_pairs(tmp_path: Path, tokenizer: OPTTokenizer):
    path = tmp_path / "pairs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        writer.writerow([0, "my dog, sleeps", "my fox, sleeps", "stereo", "age"])
        writer.writerow([1, "the fox", "the dog", "stereo", "age"])
        writer.writerow([2, "a dog", "a fox", "antistereo", "gender"])
    name, comparisons = read_comparisons(path)
    assert (name, len(comparisons)) == ("crows-pairs", 3)
    result = evaluate_bias(Likes(tokenizer, " dog"), tokenizer, comparisons, 64, name)
    assert result.stereotype == pytest.approx(200 / 3)
    assert result.kinds == {"age": 50, "gender": 100}
    assert (result.language_model, result.icat) == (None, None)
    costs = [
        sum(
            1 if t in tokenizer.encode(" dog", add_special_tokens=False) else 2
            for t in tokenizer.encode(w, add_special_tokens=False)
        )
        for w in (" fox", " dog")
    ]
    assert result.likelihood_difference == pytest.approx(costs[0] - costs[1])
    assert len(read_comparisons(path, 2)[1]) == 2


def stereoset(*entries: tuple[str, str, str, list[str]]) -> dict[str, Any]:
    parts: dict[str, list[Any]] = {"intersentence": [], "intrasentence": []}
    for part, target, context, texts in entries:
        labels = ("stereotype", "anti-stereotype", "unrelated")
        sentences = [{"sentence": s, "gold_label": n} for s, n in zip(texts, labels, strict=True)]
        entry = {"target": target, "bias_type": "race", "context": context}
        parts[part].append(entry | {"sentences": sentences[::-1]})
    return {"version": "1.0", "data": parts}


def test_stereoset(tmp_path: Path, tokenizer: OPTTokenizer):
    likes = Likes(tokenizer, " dog", " world")
    contents = stereoset(
        ("intrasentence", "x", "the BLANK", ["the dog", "the fox", "the lazy"]),
        ("intrasentence", "x", "the BLANK", ["the fox", "the dog", "the world"]),
        ("intersentence", "y", "I like it.", ["dog dog", "fox", "lazy"]),
    )
    (tmp_path / "dev.json").write_text(json.dumps(contents))
    name, comparisons = read_comparisons(tmp_path / "dev.json")
    assert name == "stereoset"
    assert [c.context for c in comparisons] == ["", "", "I like it. "]

    def mean(context: str, text: str) -> float:
        ids = tokenizer.encode(context + text)
        mine = ids[len(tokenizer.encode(context.rstrip())) :]
        return -float(np.mean([1 if t in likes.tokens else 2 for t in mine]))

    preferred: dict[str, list[float]] = {}
    sense: dict[str, list[float]] = {}
    for c in comparisons:
        more, less, none = (
            mean(c.context, t) for t in (c.stereotype, c.anti_stereotype, c.unrelated or "")
        )
        preferred.setdefault(c.target, []).append(more > less)
        sense.setdefault(c.target, []).append(((more > none) + (less > none)) / 2)
    ss = 100 * float(np.mean([np.mean(v) for v in preferred.values()]))
    lms = 100 * float(np.mean([np.mean(v) for v in sense.values()]))
    assert (ss, lms) != (50.0, 100.0)
    result = evaluate_bias(likes, tokenizer, comparisons, 64, name, 2)
    assert result.stereotype == pytest.approx(ss)
    assert result.language_model == pytest.approx(lms)
    assert result.icat == pytest.approx(lms * min(ss, 100 - ss) / 50)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a.json", "[]", "not laid out as StereoSet's JSON"),
        ("a.json", '{"data": {"intrasentence": [{"context": "x"}]}}', "not laid out as StereoSet"),
        ("a.json", '{"data": {}}', "holds no pairs"),
        ("a.csv", "sent_more,bias_type\nx,age\n", "expected a field 'sent_less'"),
        ("a.csv", "sent_more,sent_less,bias_type\nx,,age\n", "a.csv:2: a sentence is empty"),
        ("a.csv", "sent_more,sent_less,bias_type\n", "holds no pairs"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, name: str, contents: str, message: str
):
    (tmp_path / name).write_text(contents)
    with pytest.raises(DataError, match=message) as error:
        read_comparisons(tmp_path / name)
    assert "\n" not in str(error.value)
