"""Evaluation of classifiers and of extractive question answering."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.data.squad import Question, Windows
from opt_core.errors import DataError
from opt_core.evaluation.metrics import (
    accuracy,
    answer_f1,
    class_scores,
    confusion_matrix,
    exact_match,
    macro_f1,
    micro_f1,
)
from opt_core.evaluation.perplexity import Progress, padded_batches

ClassLogits = Callable[[NDArray[np.int32]], NDArray[np.float32]]
"""Ids [B, T] -> [B, classes]; `opt_torch.scoring.class_logits` and its siblings."""
SpanLogits = Callable[[NDArray[np.int32]], tuple[NDArray[np.float32], NDArray[np.float32]]]
"""Ids [B, T] -> scores of start and end, [B, T] each; `opt_torch.scoring.span_logits` and so on."""

MAX_ANSWER_TOKENS = 30
"""Longer answers are not looked for; SQuAD's are short."""


@dataclass(frozen=True)
class ClassificationResult:
    """How well texts were classified.

    Attributes:
        texts: How many.
        accuracy: Share of them.
        macro_f1: Mean F1 of the classes that occur.
        micro_f1: F1 over all; equal to the accuracy where each text has one class.
        classes: For each class by name its precision, recall, f1 and support.
        confusion: How often each class (row) was taken for each class (column).
    """

    texts: int
    accuracy: float
    macro_f1: float
    micro_f1: float
    classes: dict[str, dict[str, float]]
    confusion: list[list[int]]


def evaluate_classification(
    class_logits: ClassLogits,
    examples: Sequence[dict[str, Any]],
    label_names: Sequence[str],
    batch_size: int = 8,
    progress: Progress | None = None,
) -> ClassificationResult:
    """Classifies labelled texts.

    Args:
        class_logits: The model's.
        examples: From `encode_labelled_texts`.
        label_names: Of the classes, in the order of the model's logits.
        batch_size: Texts at a time.
        progress: Called after each batch.

    Raises:
        DataError: The model has another number of classes.
    """
    predictions: list[int] = []
    for indices, ids in padded_batches(examples, batch_size):
        logits = class_logits(ids)[: len(indices)]
        if logits.shape[1] != len(label_names):
            raise DataError(
                f"the model has {logits.shape[1]} classes, the data {len(label_names)}: "
                f"{', '.join(label_names)}"
            )
        predictions += logits.argmax(1).tolist()
        if progress:
            progress(len(predictions), len(examples))
    labels = [int(example["labels"]) for example in examples]
    matrix = confusion_matrix(predictions, labels, len(label_names))
    scores = class_scores(matrix)._asdict()
    classes = {
        label: {name: values[i].item() for name, values in scores.items()}
        for i, label in enumerate(label_names)
    }
    return ClassificationResult(
        len(labels),
        accuracy(predictions, labels),
        macro_f1(matrix),
        micro_f1(matrix),
        classes,
        matrix.tolist(),
    )


class Answer(NamedTuple):
    """A piece of a context, taken for an answer; its text is empty for "no answer"."""

    text: str
    score: float


@dataclass(frozen=True)
class QuestionResult:
    """How well questions were answered.

    Attributes:
        questions: How many.
        exact_match: Percentage of answers that equal an accepted one, as SQuAD compares them.
        f1: Mean F1 of shared words, in percent.
        answers: Each question's answer, by the question's id.
    """

    questions: int
    exact_match: float
    f1: float
    answers: dict[str, str]


def evaluate_questions(
    span_logits: SpanLogits,
    questions: Sequence[Question],
    windows: Windows,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> QuestionResult:
    """Answers questions.

    Where some of the questions have no answer (SQuAD 2.0), "no answer" is given where its score is
    the highest; otherwise never.

    Args:
        span_logits: The model's.
        questions: From `read_questions`.
        windows: Their rows, from `encode_questions(..., training=False)`.
        batch_size: Rows at a time.
        progress: Called after each batch.
    """
    may_be_none = any(not question.answers for question in questions)
    best: dict[int, list[Answer]] = {}
    for row, start, end in _window_logits(span_logits, windows, batch_size, progress):
        index = windows.questions[row]
        found = answers_in_window(questions[index].context, windows.offsets[row], start, end, 1)
        none = [Answer("", float(start[0] + end[0]))] if may_be_none else []
        best[index] = [*best.get(index, []), *found, *none]
    answers = [best_answer(best.get(i, [])) for i in range(len(questions))]
    pairs = [(answer, q.answers) for answer, q in zip(answers, questions, strict=True)]
    return QuestionResult(
        len(questions),
        100 * float(np.mean([exact_match(*pair) for pair in pairs])),
        100 * float(np.mean([answer_f1(*pair) for pair in pairs])),
        {question.id: answer for question, answer in zip(questions, answers, strict=True)},
    )


def best_answer(candidates: Sequence[Answer]) -> str:
    """The best of the answers from all windows of a question; empty where there is none.

    "No answer" has to be the best in every window: it is worth what the least certain one says.
    """
    texts = [answer for answer in candidates if answer.text]
    none = [answer.score for answer in candidates if not answer.text]
    if not texts or (none and min(none) > max(answer.score for answer in texts)):
        return ""
    return max(texts, key=lambda answer: answer.score).text


def answers_in_window(
    context: str,
    offsets: NDArray[np.int32],
    start: NDArray[np.float32],
    end: NDArray[np.float32],
    count: int,
) -> list[Answer]:
    """The highest-scoring pieces of the context that lie in one row, best first.

    Args:
        context: The whole context.
        offsets: Where each of the row's tokens is in it, [T, 2]; -1: not of the context.
        start: Score of each token as the first, [T].
        end: Score of each token as the last, [T].
        count: How many to return at most.
    """
    places = np.flatnonzero(offsets[:, 0] >= 0)
    if not len(places):
        return []
    first, last = places[0], places[-1] + 1
    scores = start[first:last, None] + end[None, first:last]
    place = np.arange(int(last - first))
    length = place[None, :] - place[:, None]
    scores = np.where((length >= 0) & (length < MAX_ANSWER_TOKENS), scores, -np.inf).ravel()
    count = min(count, int(np.isfinite(scores).sum()))
    order = np.argpartition(-scores, count - 1)[:count]
    found: list[Answer] = []
    for index in order[np.argsort(-scores[order], kind="stable")].tolist():
        i, j = divmod(index, len(place))
        text = context[offsets[first + i, 0] : offsets[first + j, 1]].strip()
        found.append(Answer(text, float(scores[index])))
    return found


def _window_logits(
    span_logits: SpanLogits, windows: Windows, batch_size: int, progress: Progress | None
) -> Iterator[tuple[int, NDArray[np.float32], NDArray[np.float32]]]:
    """The number of each row, and its scores of start and end."""
    total = len(windows.examples)
    for indices, ids in padded_batches(windows.examples, batch_size):
        starts, ends = span_logits(ids)
        for i, row in enumerate(indices):
            yield row, starts[i], ends[i]
        if progress:
            progress(indices[-1] + 1, total)
