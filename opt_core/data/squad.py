"""Extractive question answering in SQuAD's format: character spans to token spans, and back.

A row is `</s> question </s> context`, as OPT's tokenizer joins a pair of texts. A context that does
not fit is cut into windows that overlap; a window without the answer points to its first token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.data.classification import PAD_TO_MULTIPLE_OF
from opt_core.data.readers import read_json_data, read_rows
from opt_core.errors import DataError
from opt_core.text.adapter import as_tokenizer
from opt_core.text.tokenizer import OPTTokenizer


class Question(NamedTuple):
    """A question about a text.

    Attributes:
        id: Names it in the data set.
        question: What is asked.
        context: Where the answer is.
        answers: Accepted answers; none where the context has none.
        starts: The character of the context at which each answer starts.
    """

    id: str
    question: str
    context: str
    answers: tuple[str, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Windows:
    """Questions with their contexts as rows of tokens.

    Attributes:
        examples: For `Batches`: "input_ids", "attention_mask" [T], "start_positions" and
            "end_positions", the first and last token of the answer, 0 where it is not in the row.
        questions: Which question each row belongs to.
        offsets: Of each row, [T, 2]: where in the context each token starts and ends; -1 at tokens
            that are not of the context.
        dropped: Reason -> number of questions left out.
    """

    examples: list[dict[str, NDArray[np.int32]]] = field(default_factory=list[Any])
    questions: list[int] = field(default_factory=list[int])
    offsets: list[NDArray[np.int32]] = field(default_factory=list[Any])
    dropped: dict[str, int] = field(default_factory=dict[str, int])


def read_questions(path: str | PathLike[str], limit: int | None = None) -> list[Question]:
    """Reads SQuAD's own JSON (version 1.1 or 2.0), or rows with the same fields, one per question.

    Args:
        path: A .json file, or JSON lines or Parquet.
        limit: Questions to read at most.

    Raises:
        DataError: The file cannot be read, or is not laid out so.
    """
    found: list[Question] = []
    for place, row in _question_rows(Path(path)):
        if limit is not None and len(found) == limit:
            break
        found.append(_question(row, place))
    if not found:
        raise DataError(f"{path}: holds no questions")
    return found


def encode_questions(
    questions: Sequence[Question],
    tokenizer: OPTTokenizer,
    max_length: int = 384,
    stride: int = 128,
    training: bool = True,
) -> Windows:
    """Cuts questions and contexts into rows of at most `max_length` tokens.

    Args:
        questions: From `read_questions`.
        tokenizer: Makes the ids.
        max_length: Tokens of a row.
        stride: Tokens of the context that one row shares with the next.
        training: Whether questions whose answer is not where it is said to be are left out and
            counted; otherwise answers are not looked at.

    Returns:
        The rows, all padded on the right to the same length.

    Raises:
        DataError: Numbers that do not fit, or no question is left.
    """
    if not 0 <= stride < max_length:
        raise DataError(f"stride: expected 0..{max_length - 1}, received {stride}")
    tokenizer = as_tokenizer(tokenizer)
    backend = tokenizer.backend()
    bos = tokenizer.bos_token_id
    start = [bos] if tokenizer.add_bos and bos is not None else []
    windows = Windows()
    rows: list[list[int]] = []
    for index, question in enumerate(questions):
        span = _answer_span(question) if training else None
        head = start + backend.encode(question.question, add_special_tokens=False).ids + start
        context = backend.encode(question.context, add_special_tokens=False)
        room = max_length - len(head)
        problem = "answer is not where it should start" if span == () else None
        if room <= stride:
            problem = "question too long"
        if problem or not context.ids:
            problem = problem or "empty context"
            windows.dropped[problem] = windows.dropped.get(problem, 0) + 1
            continue
        offsets = np.array(context.offsets, np.int32)
        for first in _window_starts(len(context.ids), room, stride):
            part = slice(first, first + room)
            rows.append(head + context.ids[part])
            places = np.full((len(rows[-1]), 2), -1, np.int32)
            places[len(head) :] = offsets[part]
            windows.questions.append(index)
            windows.offsets.append(places)
            answer = _token_span(places, span, offsets) if span else (0, 0)
            names = ("start_positions", "end_positions")
            windows.examples.append(
                {n: np.array(i, np.int32) for n, i in zip(names, answer, strict=True)}
            )
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in windows.dropped.items())
        raise DataError(f"none of {len(questions)} questions is left: {reasons}")
    _pad(windows, rows, tokenizer, max_length)
    return windows


def _question_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """One row per question, whichever way they are laid out."""
    if not path.name.endswith((".json", ".json.gz", ".json.zst")):
        yield from read_rows(path)
        return
    articles: Any = read_json_data(path)
    articles = cast("dict[str, Any]", articles).get("data") if isinstance(articles, dict) else None
    if not isinstance(articles, list):
        raise DataError(f"{path}: expected SQuAD's JSON, an object with a list called 'data'")
    for a, article in enumerate(cast("list[Any]", articles)):
        try:
            for p, paragraph in enumerate(article["paragraphs"]):
                for q, row in enumerate(paragraph["qas"]):
                    place = f"{path}:data[{a}].paragraphs[{p}].qas[{q}]"
                    yield place, {**row, "context": paragraph["context"]}
        except (KeyError, TypeError) as error:
            raise DataError(f"{path}:data[{a}]: not laid out as SQuAD's JSON ({error})") from None


def _question(row: dict[str, Any], place: str) -> Question:
    answers: Any = row.get("answers") or {}
    try:
        if isinstance(answers, dict):  # as the datasets library has them
            given = cast("dict[str, Any]", answers)
            texts, starts = given.get("text", ()), given.get("answer_start", ())
        else:
            texts = [a["text"] for a in answers]
            starts = [a["answer_start"] for a in answers]
        values = [row["question"], row["context"], *texts]
        if not all(isinstance(value, str) for value in values) or len(texts) != len(starts):
            raise TypeError("a question, context or answer is no text")
        identity = str(row.get("id", place))
        places = tuple(int(start) for start in starts)
        return Question(identity, row["question"], row["context"], tuple(texts), places)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{place}: expected question, context and answers (text, answer_start): {error}"
        ) from None


def _answer_span(question: Question) -> tuple[int, int] | tuple[()] | None:
    """The characters of the first answer; None: there is none; (): it is not where it should be."""
    if not question.answers:
        return None
    answer, start = question.answers[0], question.starts[0]
    end = start + len(answer)
    if start < 0 or not answer.strip() or question.context[start:end] != answer:
        return ()
    return end - len(answer.lstrip()), start + len(answer.rstrip())


def _window_starts(count: int, room: int, stride: int) -> range:
    """Where the windows over some tokens start; the last one reaches the end."""
    return range(0, max(1, count - stride), room - stride)


def _token_span(
    places: NDArray[np.int32], span: tuple[int, int], offsets: NDArray[np.int32]
) -> tuple[int, int]:
    """The first and last token of a row that the answer touches; (0, 0) where it is not all in."""
    start, end = span
    inside = (places[:, 1] > start) & (places[:, 0] < end) & (places[:, 0] >= 0)
    wanted = (offsets[:, 1] > start) & (offsets[:, 0] < end)
    if inside.sum() < wanted.sum():
        return 0, 0
    found = np.flatnonzero(inside)
    return int(found[0]), int(found[-1])


def _pad(windows: Windows, rows: list[list[int]], tokenizer: OPTTokenizer, max_length: int) -> None:
    longest = max(map(len, rows))
    width = min(longest + -longest % PAD_TO_MULTIPLE_OF, max_length)
    pad = tokenizer.pad_token_id
    if pad is None and any(len(row) < width for row in rows):
        raise DataError("rows of different lengths need a pad_token, which this tokenizer lacks")
    for i, row in enumerate(rows):
        ids = np.full(width, pad or 0, np.int32)
        ids[: len(row)] = row
        mask = (np.arange(width) < len(row)).astype(np.int32)
        windows.examples[i] = {"input_ids": ids, "attention_mask": mask, **windows.examples[i]}
        empty = np.full((width - len(row), 2), -1, np.int32)
        windows.offsets[i] = np.concatenate([windows.offsets[i], empty])
