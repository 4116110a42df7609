"""Reads what a caller passes as texts, or as rows that are encoded already."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

from opt_core.errors import TokenizerError
from opt_core.text import tensors


def pairs_of(text: Any, text_pair: Any, is_split: bool) -> tuple[list[Any], list[Any] | None, bool]:
    """First texts, second ones or None, and whether the caller gave several.

    Args:
        text: One text, several, or pairs of two.
        text_pair: As many second texts, or None.
        is_split: Whether a text is a list of words.

    Raises:
        TokenizerError: These are no texts, or they do not pair up.
    """
    firsts, is_batch = _texts(text, "text", is_split)
    if text_pair is None:
        if not is_split and {tuple} == {*map(type, firsts)} and {2} == {*map(len, firsts)}:
            return [x for x, _ in firsts], [y for _, y in firsts], is_batch
        return firsts, None, is_batch
    seconds, _ = _texts(text_pair, "text_pair", is_split)
    if len(firsts) != len(seconds):
        raise TokenizerError(
            f"text_pair: expected {len(firsts)} texts, like text, received {len(seconds)}"
        )
    return firsts, seconds, is_batch


def _texts(value: Any, name: str, is_split: bool) -> tuple[list[Any], bool]:
    value = tensors.texts_of(value)
    if isinstance(value, str) and not is_split:
        return [value], False
    if not isinstance(value, Iterable) or isinstance(value, str | bytes | Mapping):
        wanted = "a list of words" if is_split else "a string or a sequence of strings"
        kind = type(cast(Any, value)).__name__
        raise TokenizerError(f"{name}: expected {wanted}, received {kind}")
    texts = list(cast("Iterable[Any]", value))
    if not texts:
        raise TokenizerError(f"{name}: expected at least one text, received none")
    if is_split and all(isinstance(text, str) for text in texts):
        return [texts], False
    return texts, True


def rows_of(encoded: Any) -> tuple[dict[str, list[Any]], bool]:
    """Columns of rows as lists, and whether there were several rows.

    Args:
        encoded: A dictionary of rows, or of one row; or a list of dictionaries of one row each.

    Raises:
        TokenizerError: It is neither.
    """
    if isinstance(encoded, Mapping):
        given: Mapping[str, Any] = cast("Mapping[str, Any]", encoded)
        columns = {name: _listed(column) for name, column in given.items()}
        ids: list[Any] = columns.get("input_ids") or [[]]
        is_batch = isinstance(ids[0], list | tuple)
        return (columns if is_batch else {n: [c] for n, c in columns.items()}), is_batch
    rows: list[Any] = list(encoded)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise TokenizerError("pad: expected a dictionary of rows, or a list of dictionaries")
    return {name: [_listed(row[name]) for row in rows] for name in rows[0]}, True


def _listed(values: Any) -> Any:
    """Tensors as lists; TensorFlow's have `numpy` and no `tolist`."""
    array = values.numpy() if hasattr(values, "numpy") else values
    return array.tolist() if hasattr(array, "tolist") else array
