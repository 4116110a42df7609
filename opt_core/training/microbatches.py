"""A step's batch, cut into parts that are computed one after the other: names, parts and shares."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from opt_core.errors import InputError

IGNORE_INDEX = -100
"""Label of a token that has no say in the loss."""

Batch = dict[str, Any]
"""Arrays by name, NumPy's or a framework's."""


def as_batch(batch: Any) -> Batch:
    """A batch as named arrays; bare ids are the labels too."""
    if isinstance(batch, Mapping):
        named = {str(name): _array(value) for name, value in batch.items()}  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        if "input_ids" not in named:
            raise InputError(f"batch: expected input_ids, received {', '.join(named) or 'nothing'}")
        return named
    ids = _array(batch)
    return {"input_ids": ids, "labels": ids}


def count_labels(batch: Batch, is_language_model: bool) -> int:
    """How many predictions a batch's mean loss is a mean of.

    Args:
        batch: From `as_batch`.
        is_language_model: Labels are shifted by one; otherwise rows without labels, or with
            floats, count once each.
    """
    labels = batch.get("labels")
    if labels is None or (not is_language_model and "float" in str(labels.dtype)):
        return len(batch["input_ids"])
    kept = labels[:, 1:] if is_language_model else labels
    return int((kept != IGNORE_INDEX).sum())


def split_batch(
    batch: Batch, count: int, is_language_model: bool, total: int | None = None
) -> Iterator[tuple[Batch, float]]:
    """Cuts a batch by rows, each part with its share of the whole batch's mean loss.

    Args:
        batch: From `as_batch`.
        count: Number of parts.
        is_language_model: As in `count_labels`.
        total: Predictions of the whole batch, where other processes have other rows of it: they
            wait for one another, so a part that predicts nothing is not left out.

    Raises:
        InputError: The rows do not divide, or no label has a say.
    """
    if count == 1 and total is None:
        yield batch, 1.0
        return
    rows = len(batch["input_ids"])
    if rows % count:
        raise InputError(f"batch: {rows} rows cannot be computed in {count} equal parts")
    is_alone = total is None
    total = count_labels(batch, is_language_model) if is_alone else total
    if not total:
        raise InputError(f"batch: expected labels that are not {IGNORE_INDEX}, received none")
    size = rows // count
    for start in range(0, rows, size):
        part = {name: values[start : start + size] for name, values in batch.items()}
        labels = count_labels(part, is_language_model)
        if labels or not is_alone:
            yield part, labels / total


def _array(value: Any) -> Any:
    return value if hasattr(value, "shape") else np.asarray(value)
