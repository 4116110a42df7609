"""Zero-shot multiple choice by log-likelihood, on files in the public data sets' own formats.

Prompts are those of EleutherAI's harness, so that figures can be compared: LAMBADA's last word,
PIQA and ARC as "Question: ... Answer:", HellaSwag with the activity before its context.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from os import PathLike
from typing import Any, NamedTuple, cast

import numpy as np

from opt_core.data.classification import required_field
from opt_core.data.readers import read_rows
from opt_core.errors import DataError
from opt_core.evaluation.metrics import most_likely, perplexity
from opt_core.evaluation.perplexity import Progress, TokenScores, score_continuations
from opt_core.text.tokenizer import OPTTokenizer


class Item(NamedTuple):
    """One choice to make.

    Attributes:
        context: What comes before.
        choices: Continuations, the spaces before them included.
        label: Which one is right; 0 where there is one alone, to be predicted word for word.
    """

    context: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class ChoiceResult:
    """How often the right continuation was the likeliest.

    Attributes:
        format: The data set's format: lambada, piqa, hellaswag, arc or choices.
        items: How many there were.
        acc: Share of items whose right choice has the highest log-likelihood; of items with one
            choice, share of those whose every token is the likeliest.
        acc_norm: The same with log-likelihoods per character of the choice; None for LAMBADA.
        acc_error: Standard error of `acc`.
        perplexity: Of LAMBADA's last words, each as a whole; None otherwise.
    """

    format: str
    items: int
    acc: float
    acc_norm: float | None
    acc_error: float
    perplexity: float | None


def read_items(path: str | PathLike[str], limit: int | None = None) -> tuple[str, list[Item]]:
    """Reads items, their format found from the fields of the first row.

    Args:
        path: JSON lines, a table or Parquet with the fields of LAMBADA (text), PIQA (goal, sol1,
            sol2, label), HellaSwag (activity_label, ctx_a, ctx_b, endings, label), ARC (question,
            choices, answerKey), or plain ones: context, choices, label.
        limit: Items to read at most.

    Returns:
        The format's name, and the items.

    Raises:
        DataError: The file cannot be read, its format is none of these, or a row is not laid out
            so.
    """
    items: list[Item] = []
    name = ""
    for place, row in read_rows(path):
        if limit is not None and len(items) == limit:
            break
        name = name or _format(row, place)
        item = _FORMATS[name](row, place)
        if not 0 <= item.label < len(item.choices):
            raise DataError(
                f"{place}: label {item.label}: expected 0..{len(item.choices) - 1}, one of the "
                "choices"
            )
        items.append(item)
    if not items:
        raise DataError(f"{path}: holds no items")
    return name, items


def evaluate_choices(
    token_scores: TokenScores,
    tokenizer: OPTTokenizer,
    items: list[Item],
    window: int,
    format: str = "choices",
    batch_size: int = 8,
    progress: Progress | None = None,
) -> ChoiceResult:
    """Lets a model choose.

    Args:
        token_scores: The model's.
        tokenizer: The model's.
        items: From `read_items`.
        window: Most tokens of a row.
        format: What to name the result after.
        batch_size: Rows at a time.
        progress: Called after each batch.
    """
    pairs = [(item.context, choice) for item in items for choice in item.choices]
    scores = score_continuations(token_scores, tokenizer, pairs, window, batch_size, progress)
    plain: list[float] = []
    normal: list[float] = []
    nats, single = 0.0, all(len(item.choices) == 1 for item in items)
    start = 0
    for item in items:
        mine = scores[start : start + len(item.choices)]
        start += len(mine)
        likelihoods = [score.log_likelihood for score in mine]
        if single:
            plain.append(float(mine[0].is_greedy))
            nats -= likelihoods[0]
            continue
        lengths = [len(choice.lstrip(" ")) for choice in item.choices]
        plain.append(float(most_likely(likelihoods) == item.label))
        normal.append(float(most_likely(likelihoods, lengths) == item.label))
    spread = float(np.std(plain, ddof=1)) if len(plain) > 1 else 0.0
    return ChoiceResult(
        format,
        len(items),
        float(np.mean(plain)),
        float(np.mean(normal)) if normal else None,
        spread / len(plain) ** 0.5,
        perplexity(nats, len(items)) if single else None,
    )


def _format(row: dict[str, Any], place: str) -> str:
    for name, fields in (
        ("piqa", {"goal", "sol1", "sol2"}),
        ("hellaswag", {"ctx_a", "ctx_b", "endings"}),
        ("arc", {"question", "choices", "answerKey"}),
        ("choices", {"context", "choices"}),
        ("lambada", {"text"}),
    ):
        if fields <= row.keys():
            return name
    raise DataError(
        f"{place}: fields of no known format (LAMBADA, PIQA, HellaSwag, ARC, or context, choices "
        f"and label): {', '.join(map(repr, row))}"
    )


def _lambada(row: dict[str, Any], place: str) -> Item:
    context, space, word = _string(row, "text", place).strip().rpartition(" ")
    if not space:
        raise DataError(f"{place}: 'text' has no last word to predict from others")
    return Item(context, (f" {word}",), 0)


def _piqa(row: dict[str, Any], place: str) -> Item:
    choices = tuple(" " + _string(row, name, place) for name in ("sol1", "sol2"))
    context = f"Question: {_string(row, 'goal', place)}\nAnswer:"
    return Item(context, choices, _integer(row, "label", place))


def _hellaswag(row: dict[str, Any], place: str) -> Item:
    start, end = _string(row, "ctx_a", place), _string(row, "ctx_b", place).capitalize()
    context = without_marks(f"{_string(row, 'activity_label', place)}: {start} {end}")
    endings = tuple(" " + without_marks(text) for text in _strings(row, "endings", place))
    return Item(context, endings, _integer(row, "label", place))


def _arc(row: dict[str, Any], place: str) -> Item:
    question: Any = row["question"]
    choices: Any = row["choices"]
    try:
        if isinstance(question, dict):  # AI2's own files
            inner = cast("dict[str, Any]", question)
            question, choices = inner["stem"], inner["choices"]
        names: list[Any]
        texts: list[Any]
        if isinstance(choices, dict):
            columns = cast("dict[str, list[Any]]", choices)
            names, texts = list(columns["label"]), list(columns["text"])
        else:
            names, texts = [c["label"] for c in choices], [c["text"] for c in choices]
        label = names.index(row["answerKey"])
        return Item(f"Question: {question}\nAnswer:", tuple(f" {text}" for text in texts), label)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{place}: not laid out as ARC's questions: {error}") from None


def _plain(row: dict[str, Any], place: str) -> Item:
    choices = tuple(_strings(row, "choices", place))
    return Item(_string(row, "context", place), choices, _integer(row, "label", place))


_FORMATS: dict[str, Callable[[dict[str, Any], str], Item]] = {
    "lambada": _lambada,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "arc": _arc,
    "choices": _plain,
}


def without_marks(text: str) -> str:
    """A text of HellaSwag's without what is left of the headings of WikiHow."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _string(row: dict[str, Any], name: str, place: str) -> str:
    value = required_field(row, name, place)
    if not isinstance(value, str):
        raise DataError(f"{place}: {name!r}: expected a string, found {type(value).__name__}")
    return value


def _strings(row: dict[str, Any], name: str, place: str) -> list[str]:
    values: Any = required_field(row, name, place)
    texts = cast("list[Any]", values) if isinstance(values, list) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{place}: {name!r}: expected a list of strings")
    return texts


def _integer(row: dict[str, Any], name: str, place: str) -> int:
    value = required_field(row, name, place)
    try:
        return int(value)
    except (TypeError, ValueError):
        raise DataError(f"{place}: {name!r}: expected a number, found {value!r}") from None
