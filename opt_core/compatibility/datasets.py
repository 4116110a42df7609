"""`prepare_tf_dataset` of `transformers`, as far as no framework is needed: rows into batches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import DataError
from opt_core.training.microbatches import IGNORE_INDEX

LABELS = ("labels", "start_positions", "end_positions")
"""Inputs of the models that are labels."""

_RENAMED = {"label": "labels", "label_ids": "labels"}


def columns_of(dataset: Any, accepted: Iterable[str]) -> dict[str, str]:
    """Columns of a dataset that a model has use for.

    Args:
        dataset: Rows that are mappings, by number: a list, or one of Hugging Face's `datasets`.
        accepted: Names of the model's inputs.

    Returns:
        The name of each column -> the model's name for it.

    Raises:
        DataError: There are no rows, or none of these columns.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or not len(dataset):
        raise DataError(
            f"dataset: expected rows that are mappings, received {type(dataset).__name__}"
        )
    row, wanted = dataset[0], set(accepted)
    if not isinstance(row, Mapping):
        raise DataError(f"dataset: expected rows that are mappings, received {type(row).__name__}")
    names = {str(name): _RENAMED.get(str(name), str(name)) for name in cast(Iterable[Any], row)}
    kept = {name: own for name, own in names.items() if own in wanted}
    if not kept:
        raise DataError(f"dataset: expected columns such as input_ids, received {', '.join(names)}")
    return kept


def batches_of(
    dataset: Any,
    columns: Mapping[str, str],
    batch_size: int,
    collate: Callable[[list[dict[str, Any]]], Mapping[str, Any]],
    drop_remainder: bool,
    rng: np.random.Generator | None,
) -> Iterator[dict[str, NDArray[Any]]]:
    """One pass over a dataset.

    Args:
        dataset: As in `columns_of`.
        columns: What to take of each row (`columns_of`).
        batch_size: Rows of a batch.
        collate: Makes a batch of rows.
        drop_remainder: Leave out a last batch of fewer rows.
        rng: Shuffles; None: in order.

    Yields:
        Arrays, integers as int32.
    """
    order = np.arange(len(dataset)) if rng is None else rng.permutation(len(dataset))
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        if drop_remainder and len(numbers) < batch_size:
            return
        rows = [dataset[int(number)] for number in numbers]
        made = collate([{own: row[name] for name, own in columns.items()} for row in rows])
        yield {_RENAMED.get(name, name): _as_array(values) for name, values in made.items()}


def stack_rows(
    rows: Sequence[Mapping[str, Any]], pad_token_id: int | None, padding_side: str = "right"
) -> dict[str, NDArray[Any]]:
    """A batch of rows, the shorter ones padded.

    Args:
        rows: Of the same columns; an `attention_mask` is made where there is none.
        pad_token_id: Fills `input_ids`; None: 0. Labels are filled with -100, all else with 0.
        padding_side: "right" or "left".
    """
    made: dict[str, NDArray[Any]] = {}
    for name in rows[0]:
        values = [_as_array(row[name]) for row in rows]
        width = max(len(value) if value.ndim else 0 for value in values)
        fill = {"input_ids": pad_token_id or 0, "labels": IGNORE_INDEX}.get(name, 0)
        made[name] = np.stack([_padded(value, width, fill, padding_side) for value in values])
    if "input_ids" in made and "attention_mask" not in made:
        ones = [np.ones(len(row["input_ids"]), np.int32) for row in rows]
        width = made["input_ids"].shape[1]
        made["attention_mask"] = np.stack([_padded(o, width, 0, padding_side) for o in ones])
    return made


def _padded(value: NDArray[Any], width: int, fill: int, side: str) -> NDArray[Any]:
    if not value.ndim or len(value) == width:
        return value
    free = (0, width - len(value)) if side == "right" else (width - len(value), 0)
    return np.pad(value, [free] + [(0, 0)] * (value.ndim - 1), constant_values=fill)


def _as_array(values: Any) -> NDArray[Any]:
    array = np.asarray(values)
    return array.astype(np.int32) if array.dtype.kind in "iub" else array.astype(np.float32)
