"""Rows of the public files -> documents in the hub's layout, the one that prompts are made of.

Public releases and the hub differ: nested passages and questions, answers as letters or words,
columns of other names. Either is taken.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

from opt_core.data.classification import required_field
from opt_core.errors import DataError

Doc = dict[str, Any]
Reader = Callable[[Doc, str], Iterator[Doc]]
"""(row, its place) -> documents."""


def plain(row: Doc, place: str) -> Iterator[Doc]:
    """A row that is a document as it stands; its label, if it has one, becomes a number."""
    yield {**row, "label": _number(row["label"], place)} if "label" in row else row


def labels(*names: str) -> Reader:
    """A reader of rows whose label is a word, or its number.

    Args:
        names: The words, in the order of their numbers.
    """

    def read(row: Doc, place: str) -> Iterator[Doc]:
        label = required_field(row, "label", place)
        if isinstance(label, str) and label not in names:
            raise DataError(f"{place}: label {label!r}: expected one of {', '.join(names)}")
        number = names.index(label) if isinstance(label, str) else _number(label, place)
        yield {**row, "label": number}

    return read


def lettered(row: Doc, place: str) -> Iterator[Doc]:
    """ARC and OpenBookQA: choices with letters, in the row or in its question."""
    question = row.get("question")
    if isinstance(question, dict):
        inner = cast("Doc", question)
        choices = required_field(inner, "choices", place)
        stem = required_field(inner, "stem", place)
        row = {**row, "question": stem, "question_stem": stem, "choices": choices}
    choices = required_field(row, "choices", place)
    if isinstance(choices, list):
        pairs = cast("list[Doc]", choices)
        choices = {
            name: [required_field(pair, name, place) for pair in pairs]
            for name in ("text", "label")
        }
    answer = str(required_field(row, "answerKey", place)).strip()
    letters = [str(letter) for letter in required_field(choices, "label", place)]
    if answer not in letters:
        raise DataError(f"{place}: answerKey {answer!r}: expected one of {', '.join(letters)}")
    yield {**row, "choices": choices, "label": letters.index(answer)}


_STORYCLOZE = {
    **{f"InputSentence{i}": f"input_sentence_{i}" for i in range(1, 5)},
    "RandomFifthSentenceQuiz1": "sentence_quiz1",
    "RandomFifthSentenceQuiz2": "sentence_quiz2",
    "AnswerRightEnding": "answer_right_ending",
}


def storycloze(row: Doc, place: str) -> Iterator[Doc]:
    """StoryCloze's table, its columns named as published or as on the hub."""
    doc = {_STORYCLOZE.get(name, name): value for name, value in row.items()}
    yield {**doc, "label": _number(required_field(doc, "answer_right_ending", place), place) - 1}


def winograd(row: Doc, place: str) -> Iterator[Doc]:
    """WSC273 as on the hub, or made of the collection's XML: see `read_winograd_xml`."""
    text, pronoun = required_field(row, "text", place), required_field(row, "pronoun", place)
    at = len(text[: required_field(row, "pronoun_loc", place)].replace("  ", " "))
    text = text.replace("  ", " ")
    options = [
        _name_in_place(option, text, pronoun, at)
        for option in required_field(row, "options", place)
    ]
    label = _number(required_field(row, "label", place), place)
    yield {"text": text, "pronoun": pronoun, "pronoun_loc": at, "options": options, "label": label}


def _name_in_place(option: str, text: str, pronoun: str, at: int) -> str:
    """A name as it would stand where the pronoun stands: with 's, and in lower case."""
    if pronoun.lower() in ("my", "his", "her", "our", "their"):
        option += "'s"
    first = option.split()[0]
    starts_sentence = text[at - 2] == "."
    if not starts_sentence and first in _CAPITALISED:
        return option.replace(first, first.lower())
    return option


_CAPITALISED = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")


def read_winograd_xml(path: Path) -> Iterator[tuple[str, Doc]]:
    """The first 273 schemas of WSCollection.xml, as the hub's rows, each with its place.

    Raises:
        DataError: The file is no XML, or is laid out in another way.
    """
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path}: cannot be read as XML: {error}") from None
    for number, schema in enumerate(list(root.iter("schema"))[:273], 1):
        place = f"{path}:[{number}]"
        before, pronoun, after = (
            " ".join((schema.findtext(f"text/{name}") or "").split())
            for name in ("txt1", "pron", "txt2")
        )
        options = [" ".join((a.text or "").split()) for a in schema.findall("answers/answer")]
        answer = (schema.findtext("correctAnswer") or "").strip()
        if not pronoun or len(options) != 2 or answer[:1] not in ("A", "B"):
            raise DataError(
                f"{place}: expected text with a pron, two answers and a correctAnswer A or B"
            )
        yield (
            place,
            {
                "text": " ".join([before, pronoun, after]).strip(),
                "pronoun": pronoun,
                "pronoun_loc": len(before) + 1 if before else 0,
                "options": options,
                "label": "AB".index(answer[0]),
            },
        )


def wsc(row: Doc, place: str) -> Iterator[Doc]:
    """SuperGLUE's WSC: the two spans in a field of their own, or beside the text.

    Where a span's text does not occur in the text, it is mended as the hub's "wsc.fixed" does it:
    the case of its first letter, a full stop at its end, line ends.
    """
    target = row.get("target")
    doc = {**row, **(cast("Doc", target) if isinstance(target, dict) else {})}
    text: str = required_field(doc, "text", place)
    for name in ("span1", "span2"):
        span: str = required_field(doc, f"{name}_text", place)
        index = _number(required_field(doc, f"{name}_index", place), place)
        words = text.split()
        if not 0 <= index < len(words):
            raise DataError(f"{place}: {name}_index {index}: expected 0..{len(words) - 1}")
        if span not in text:
            is_lower = words[index][0].islower()
            first = span[0].lower() if is_lower else span[0].upper()
            doc[f"{name}_text"] = (first + span[1:]).rstrip(".").replace("\n", " ")
    yield {**doc, "label": _number(required_field(doc, "label", place), place)}


def multirc(row: Doc, place: str) -> Iterator[Doc]:
    """MultiRC: a passage with questions with answers, each answer a document of its own."""
    if "passage" not in row:
        yield from plain(row, place)
        return
    passage = row["passage"]
    for question in required_field(passage, "questions", place):
        for answer in required_field(question, "answers", place):
            yield {
                "paragraph": required_field(passage, "text", place),
                "question": required_field(question, "question", place),
                "answer": required_field(answer, "text", place),
                "label": _number(required_field(answer, "label", place), place),
            }


def record(row: Doc, place: str) -> Iterator[Doc]:
    """ReCoRD: a passage whose entities are spans, with queries, each a document of its own."""
    passage = required_field(row, "passage", place)
    if isinstance(passage, str):
        yield _record(passage, row["query"], row["entities"], row["answers"], place)
        return
    text: str = required_field(passage, "text", place)
    # The last character is part of a span.
    entities = [text[e["start"] : e["end"] + 1] for e in required_field(passage, "entities", place)]
    for query in required_field(row, "qas", place):
        answers = [answer["text"] for answer in required_field(query, "answers", place)]
        yield _record(text, required_field(query, "query", place), entities, answers, place)


def _record(passage: str, query: str, entities: list[str], answers: list[str], place: str) -> Doc:
    if not entities or not answers:
        raise DataError(f"{place}: expected entities and answers, found none")
    return {
        "passage": passage,
        "query": query,
        "entities": sorted({*entities}),
        "answers": sorted({*answers}),
        "label": 0,  # any entity that is an answer is right
    }


def _number(value: Any, place: str) -> int:
    if isinstance(value, str) and re.fullmatch(r"\s*-?\d+\s*", value) is None:
        raise DataError(f"{place}: expected a number, found {value!r}")
    try:
        return int(value)  # true is 1
    except (TypeError, ValueError):
        raise DataError(f"{place}: expected a number, found {value!r}") from None
