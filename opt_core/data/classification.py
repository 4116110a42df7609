"""Labelled texts for classification: rows of a file as padded examples."""

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.data.readers import read_rows
from opt_core.errors import DataError
from opt_core.text.adapter import as_tokenizer
from opt_core.text.tokenizer import OPTTokenizer

PAD_TO_MULTIPLE_OF = 8
"""Rows are padded to a multiple of so many tokens, which all backends' products like."""


@dataclass(frozen=True)
class LabelledTexts:
    """Texts, or pairs of texts, each with the number of its class.

    Attributes:
        texts: The texts.
        pairs: As many second texts, or None.
        labels: Class numbers.
        label_names: Name of each class.
    """

    texts: list[str]
    pairs: list[str] | None
    labels: list[int]
    label_names: tuple[str, ...]


def read_labelled_texts(
    path: str | PathLike[str],
    label_names: Sequence[str] | None = None,
    text_field: str = "text",
    label_field: str = "label",
    pair_field: str | None = None,
    limit: int | None = None,
) -> LabelledTexts:
    """Reads labelled texts from JSON lines, a table or Parquet.

    Args:
        path: The file.
        label_names: Names of the classes, in the order of their numbers: those of the training
            data, or of a model (`config.id2label`). None: they are the names that occur, sorted,
            or LABEL_0, LABEL_1, ... where labels are numbers.
        text_field: Where the text is.
        label_field: Where the label is: a name, or a number.
        pair_field: Where a second text is, for pairs.
        limit: Rows to read at most.

    Raises:
        DataError: The file cannot be read, a row lacks a field or has an empty text or a label that
            is no class, or there are no rows.
    """
    names = [text_field, *([pair_field] if pair_field else [])]
    columns: dict[str, list[str]] = {name: [] for name in names}
    labels: list[str | int] = []
    places: list[str] = []
    for place, row in read_rows(path):
        if limit is not None and len(labels) == limit:
            break
        for name in names:
            columns[name].append(_text(row, name, place))
        labels.append(_label(row, label_field, place))
        places.append(place)
    if not labels:
        raise DataError(f"{path}: holds no rows")
    known = tuple(label_names or _infer_label_names(labels, str(path)))
    numbers = [
        _class_number(label, known, place) for label, place in zip(labels, places, strict=True)
    ]
    pairs = columns[pair_field] if pair_field else None
    return LabelledTexts(columns[text_field], pairs, numbers, known)


def encode_labelled_texts(
    data: LabelledTexts, tokenizer: OPTTokenizer, max_length: int
) -> list[dict[str, NDArray[np.int32]]]:
    """Examples for `Batches`: "input_ids" and "attention_mask" [T], and "labels", a number.

    Args:
        data: What to encode.
        tokenizer: Makes the ids; a second text begins with the beginning-of-text token, too.
        max_length: The end of longer texts is cut off.

    Returns:
        One example per text, all padded on the right to the same length T: that of the longest one,
        rounded up.
    """
    tokenizer = as_tokenizer(tokenizer)
    encoded = tokenizer(
        data.texts, data.pairs, max_length=max_length, truncation=True, padding_side="right"
    )
    ids, mask = encoded.input_ids, encoded.attention_mask
    pad = tokenizer.pad_token_id
    if pad is not None:
        room = min(-ids.shape[1] % PAD_TO_MULTIPLE_OF, max_length - ids.shape[1])
        ids = np.pad(ids, ((0, 0), (0, room)), constant_values=pad)
        mask = np.pad(mask, ((0, 0), (0, room)))
    return [
        {"input_ids": row, "attention_mask": kept, "labels": np.array(label, np.int32)}
        for row, kept, label in zip(ids, mask, data.labels, strict=True)
    ]


def required_field(row: dict[str, Any], name: str, place: str) -> Any:
    """A field of a row.

    Raises:
        DataError: The row lacks it.
    """
    if name not in row:
        there = ", ".join(map(repr, row)) or "nothing"
        raise DataError(f"{place}: expected a field {name!r}, found {there}")
    return row[name]


def _text(row: dict[str, Any], name: str, place: str) -> str:
    text = required_field(row, name, place)
    if not isinstance(text, str):
        raise DataError(f"{place}: {name!r}: expected a string, found {type(text).__name__}")
    if not text.strip():
        raise DataError(f"{place}: {name!r} is empty")
    return text


def _label(row: dict[str, Any], name: str, place: str) -> str | int:
    label = required_field(row, name, place)
    if isinstance(label, bool) or not isinstance(label, str | int):
        raise DataError(
            f"{place}: {name!r}: expected a class's name or number, found {type(label).__name__}"
        )
    return label


def _infer_label_names(labels: list[str | int], source: str) -> list[str]:
    """Names for the classes of labels that come without."""
    if len({type(label) for label in labels}) > 1:
        raise DataError(f"{source}: some labels are names and some are numbers; expected one kind")
    if all(isinstance(label, int) or label.isdecimal() for label in labels):
        numbers = [int(label) for label in labels]
        if min(numbers) < 0:
            raise DataError(
                f"{source}: labels: expected class numbers from 0, found {min(numbers)}"
            )
        if max(numbers) >= len(numbers):
            raise DataError(
                f"{source}: labels: expected class numbers 0, 1, ..., found {max(numbers)} among "
                f"{len(numbers)} rows: more classes than rows"
            )
        names = [f"LABEL_{i}" for i in range(max(numbers) + 1)]
    else:
        names = sorted({str(label) for label in labels})
    if len(names) < 2:
        raise DataError(f"{source}: expected at least two classes, found {', '.join(names)} alone")
    return names


def _class_number(label: str | int, names: Sequence[str], place: str) -> int:
    if isinstance(label, str) and label in names:
        return names.index(label)
    if isinstance(label, str) and not label.isdecimal():
        raise DataError(f"{place}: label {label!r} is none of {', '.join(names)}")
    if not 0 <= int(label) < len(names):
        raise DataError(f"{place}: label {int(label)}: expected a class number 0..{len(names) - 1}")
    return int(label)
