"""Extractive answers: characters to tokens and back, windows over long contexts, bad spans."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.data.squad import Question, encode_questions, read_questions
from opt_core.errors import DataError
from tests.support.small_tokenizer import write_opt_folder

CONTEXT = (
    "In 1955 Zoë Müller, 29, moved to Köln 日本; the dog 🎉 sleeps in the older world.  Then " * 4
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


def asked(answer: str, start: int | None = None, context: str = CONTEXT) -> Question:
    start = context.index(answer) if start is None else start
    return Question("q", "Who is the dog?", context, (answer,), (start,))


def squad(*questions: Question, **changes: Any) -> dict[str, Any]:
    qas = [
        {
            "id": q.id,
            "question": q.question,
            "answers": [
                {"text": a, "answer_start": s} for a, s in zip(q.answers, q.starts, strict=True)
            ],
        }
        for q in questions
    ]
    return {"data": [{"paragraphs": [{"context": questions[0].context, "qas": qas}]}], **changes}


def test_both_layouts_hold_the_same_questions(tmp_path: Path):
    questions = [asked("Köln"), Question("r", "Why?", CONTEXT, (), ()), asked("dog")]
    (tmp_path / "a.json").write_text(json.dumps(squad(*questions, version="v2.0")))
    lines = [
        {
            "id": q.id, "question": q.question, "context": q.context, "title": "x",
            "answers": {"text": list(q.answers), "answer_start": list(q.starts)},
        }
        for q in questions
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_questions(tmp_path / "a.json") == questions
    assert read_questions(tmp_path / "a.jsonl") == questions
    assert read_questions(tmp_path / "a.json", limit=1) == questions[:1]


@pytest.mark.parametrize(
    "answer", ["1955", "Zoë Müller", "29", "日本", "日", "🎉", "dog", "Köln 日", "ö"]
)
def test_a_span_of_tokens_holds_the_span_of_characters(tokenizer: OPTTokenizer, answer: str):
    question = asked(answer)
    windows = encode_questions([question], tokenizer, 512, 64)
    (example,), (offsets,) = windows.examples, windows.offsets
    start, end = int(example["start_positions"]), int(example["end_positions"])
    assert start > 0
    first, last = question.starts[0], question.starts[0] + len(answer)
    assert offsets[start, 0] <= first < offsets[start, 1]
    assert offsets[end, 0] < last <= offsets[end, 1]
    assert (
        offsets[start - 1, 1] <= first
    )  # and not a token more, also where a character has several
    assert offsets[end + 1, 0] >= last
    ids = example["input_ids"][start : end + 1]
    assert answer in tokenizer.decode(ids)


def test_a_row_is_question_and_context(tokenizer: OPTTokenizer):
    windows = encode_questions([asked("dog")], tokenizer, 512, 64)
    ids = windows.examples[0]["input_ids"]
    both = tokenizer.encode("Who is the dog?") + tokenizer.encode(CONTEXT)
    assert ids[: len(both)].tolist() == both
    assert len(ids) == len(both) + -len(both) % 8
    assert windows.examples[0]["attention_mask"].sum() == len(both)
    head = len(tokenizer.encode("Who is the dog?")) + 1
    assert (windows.offsets[0][:head] == -1).all()
    assert (windows.offsets[0][len(both) :] == -1).all()


@pytest.mark.parametrize(("max_length", "stride"), [(60, 0), (60, 7), (61, 20), (90, 30)])
def test_windows_cover_the_context_and_share_a_stride(
    tokenizer: OPTTokenizer, max_length: int, stride: int
):
    question = asked("sleeps in the older", CONTEXT.rindex("sleeps in the older"))
    windows = encode_questions([question], tokenizer, max_length, stride)
    context = tokenizer.encode(CONTEXT, add_special_tokens=False)
    head = len(tokenizer.encode("Who is the dog?")) + 1
    parts = [
        e["input_ids"][head : int(e["attention_mask"].sum())].tolist() for e in windows.examples
    ]
    assert all(len(part) == max_length - head for part in parts[:-1])
    joined = parts[0]
    for before, after in pairwise(parts):
        assert before[len(before) - stride :] == after[:stride]
        joined = joined + after[stride:]
    assert joined == context
    assert set(windows.questions) == {0}
    held = 0
    for example, offsets in zip(windows.examples, windows.offsets, strict=True):
        start, end = int(example["start_positions"]), int(example["end_positions"])
        text = CONTEXT[offsets[start, 0] : offsets[end, 1]] if start else ""
        assert bool(start) == (question.answers[0] in text)
        held += bool(start)
    assert held >= (1 if stride >= 20 else 0)


def test_a_part_of_an_answer_is_no_answer(tokenizer: OPTTokenizer):
    long = CONTEXT[:250].strip()
    windows = encode_questions([asked(long)], tokenizer, 60, 7)
    assert len(windows.examples) > 3
    assert not any(int(e["start_positions"]) for e in windows.examples)


def test_answers_that_are_not_where_they_should_be_are_left_out_and_counted(
    tokenizer: OPTTokenizer,
):
    at = CONTEXT.index("Köln")
    wrong = [asked("Köln", at + 1), asked("Köln", -3), asked("Köln", 10**6), asked("", 0)]
    wrong += [asked("köln", at)]
    long = Question("q", "Who? " * 200, CONTEXT, ("Köln",), (at,))
    empty = Question("q", "Who?", "", (), ())
    right = [asked(" Köln ", at - 1), Question("q", "Why?", CONTEXT, (), ())]
    windows = encode_questions([*wrong, long, empty, *right], tokenizer, 500, 64)
    assert windows.dropped == {
        "answer is not where it should start": 5, "question too long": 1, "empty context": 1,
    }  # fmt: skip
    assert windows.questions == [7, 8]
    start = int(windows.examples[0]["start_positions"])
    offsets = windows.offsets[0]
    assert CONTEXT[offsets[start, 0] :].strip().startswith("Köln")
    assert int(windows.examples[1]["start_positions"]) == 0
    judged = encode_questions(wrong, tokenizer, 500, 64, training=False)
    assert judged.dropped == {}
    with pytest.raises(DataError, match="none of 5 questions is left: 5 answer is not where"):
        encode_questions(wrong, tokenizer, 500, 64)
    with pytest.raises(DataError, match=r"stride: expected 0\.\.63, received 64"):
        encode_questions(right, tokenizer, 64, 64)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ([], "expected SQuAD's JSON, an object with a list called 'data'"),
        ({"data": []}, "holds no questions"),
        ({"data": [{"title": "x"}]}, r"data\[0\]: not laid out as SQuAD's JSON"),
        ({"data": [{"paragraphs": [{"qas": [{}]}]}]}, "not laid out as SQuAD's JSON"),
        (
            {"data": [{"paragraphs": [{"context": "x", "qas": [{"id": "a"}]}]}]},
            r"data\[0\].paragraphs\[0\].qas\[0\]: expected question, context and answers",
        ),
        (
            {"data": [{"paragraphs": [{"context": 5, "qas": [{"question": "a"}]}]}]},
            "is no text",
        ),
        (
            {
                "data": [
                    {"paragraphs": [{"context": "x", "qas": [{"question": "a", "answers": [5]}]}]}
                ]
            },
            "expected question, context and answers",
        ),
    ],
)
def test_other_layouts_are_refused_in_one_line(tmp_path: Path, contents: Any, message: str):
    (tmp_path / "a.json").write_text(json.dumps(contents))
    with pytest.raises(DataError, match=message) as error:
        read_questions(tmp_path / "a.json")
    assert "\n" not in str(error.value)


def test_rows_of_all_questions_have_one_length(tokenizer: OPTTokenizer):
    questions = [asked("dog"), asked("dog", None, "A dog."), asked("x", None, "x")]
    windows = encode_questions(questions, tokenizer, 100, 20)
    assert len({e["input_ids"].shape for e in windows.examples}) == 1
    assert len({o.shape for o in windows.offsets}) == 1
    assert windows.questions[-2:] == [1, 2]
    assert np.stack([e["input_ids"] for e in windows.examples]).dtype == np.int32
