"""Classes and answers: from a model's logits to figures."""

from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.data.squad import Question, encode_questions
from opt_core.errors import DataError
from opt_core.evaluation.heads import (
    MAX_ANSWER_TOKENS,
    Answer,
    answers_in_window,
    best_answer,
    evaluate_classification,
    evaluate_questions,
)
from tests.support.small_tokenizer import write_opt_folder

CONTEXT = "The quick brown fox jumps over the lazy dog; the dog sleeps. " * 6 + "I like your world."


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


def test_classes_are_judged():
    examples = [
        {"input_ids": np.array([2, i, 1]), "labels": np.array(label)}
        for i, label in enumerate([0, 1, 2, 1, 0])
    ]
    predicted = [0, 1, 1, 1, 2]
    shapes: list[tuple[int, ...]] = []

    def class_logits(ids: Any) -> Any:
        shapes.append(ids.shape)
        return np.eye(3, dtype=np.float32)[[predicted[i] for i in ids[:, 1]]]

    told: list[tuple[int, int]] = []
    result = evaluate_classification(
        class_logits, examples, ["a", "b", "c"], 2, lambda *done: told.append(done)
    )
    assert result.accuracy == result.micro_f1 == 0.6
    assert result.confusion == [[1, 0, 1], [0, 2, 0], [0, 1, 0]]
    assert result.classes["b"] == {
        "precision": pytest.approx(2 / 3), "recall": 1, "f1": pytest.approx(0.8), "support": 2,
    }  # fmt: skip
    assert result.macro_f1 == pytest.approx((2 / 3 + 0.8 + 0) / 3)
    assert set(shapes) == {(2, 3)}  # the last batch is filled up
    assert told[-1] == (5, 5)
    with pytest.raises(DataError, match="the model has 3 classes, the data 2: a, b"):
        evaluate_classification(class_logits, examples, ["a", "b"])


def test_the_best_pieces_of_a_window_come_first():
    rng = np.random.default_rng(0)
    offsets = np.array([[-1, -1]] * 4 + [[i, i + 1] for i in range(40)] + [[-1, -1]] * 3)
    context = "".join(chr(ord("a") + i % 26) for i in range(40))
    start, end = rng.normal(size=(2, 47)).astype(np.float32)
    start[:4], end[-3:] = 99, 99  # neither question nor padding is an answer
    found = answers_in_window(context, offsets.astype(np.int32), start, end, 10)
    every = [
        Answer(context[i : j + 1], float(start[4 + i] + end[4 + j]))
        for i in range(40)
        for j in range(i, min(40, i + MAX_ANSWER_TOKENS))
    ]
    assert found == sorted(every, key=lambda a: -a.score)[:10]
    assert answers_in_window("", np.full((5, 2), -1, np.int32), start[:5], end[:5], 3) == []
    assert len(answers_in_window("ab", offsets[4:6].astype(np.int32), start[:2], end[:2], 9)) == 3


@pytest.mark.parametrize(
    ("candidates", "best"),
    [
        ([], ""),
        ([Answer("x", 1.0), Answer("y", 2.0)], "y"),
        ([Answer("x", 1.0), Answer("", 2.0)], ""),
        ([Answer("x", 1.0), Answer("", 2.0), Answer("", 0.5)], "x"),
        ([Answer("", 2.0)], ""),
    ],
)
def test_no_answer_must_win_in_every_window(candidates: list[Answer], best: str):
    assert best_answer(candidates) == best


def test_answers_are_found_wherever_they_are(tokenizer: OPTTokenizer):
    answers = ["brown fox", "sleeps", "like your world", "quick"]
    questions = [
        Question(f"q{i}", "What?", CONTEXT, (a,), (CONTEXT.rindex(a),))
        for i, a in enumerate(answers)
    ]
    encoded = encode_questions(questions, tokenizer, 64, 24)
    assert len(encoded.examples) > 3 * len(questions)
    rows = iter(range(len(encoded.examples)))

    def perfect(ids: Any) -> tuple[Any, Any]:
        start, end = (np.zeros(ids.shape, np.float32) for _ in range(2))
        for i in range(len(ids)):
            row = next(rows, None)
            if row is None:
                break
            example = encoded.examples[row]
            if int(example["start_positions"]):
                start[i, int(example["start_positions"])] = 5
                end[i, int(example["end_positions"])] = 5
        return start, end

    judged = encode_questions(questions, tokenizer, 64, 24, training=False)
    result = evaluate_questions(perfect, questions, judged, 5)
    assert result.answers == {f"q{i}": a for i, a in enumerate(answers)}
    assert (result.questions, result.exact_match, result.f1) == (4, 100, 100)


def test_no_answer_is_given_only_where_the_data_know_it(tokenizer: OPTTokenizer):
    answered = Question("a", "What?", CONTEXT, ("The quick",), (0,))
    unanswered = Question("b", "Why?", CONTEXT, (), ())

    def nothing(ids: Any) -> tuple[Any, Any]:
        scores = np.zeros((2, *ids.shape), np.float32)
        scores[:, :, 0] = 9
        return scores[0], scores[1]

    for questions, exact in (([answered], 0), ([answered, unanswered], 50)):
        windows = encode_questions(questions, tokenizer, 64, 24, training=False)
        result = evaluate_questions(nothing, questions, windows)
        assert result.exact_match == exact
        assert (result.answers["a"] == "") == (len(questions) == 2)
