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
        if is_batch and _are_pairs(firsts, is_split):
            return [x for x, _ in firsts], [y for _, y in firsts], is_batch
        return firsts, None, is_batch
    seconds, _ = _texts(text_pair, "text_pair", is_split)
    if len(firsts) != len(seconds):
        raise TokenizerError(
            f"text_pair: expected {len(firsts)} texts, like text, received {len(seconds)}"
        )
    return firsts, seconds, is_batch


def _are_pairs(texts: list[Any], is_split: bool) -> bool:
    """Whether each is a tuple of two texts."""
    if {tuple} != {*map(type, texts)} or {2} != {*map(len, texts)}:
        return False
    return not is_split or not any(isinstance(word, str) for text in texts for word in text)


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


def rows_of(encoded: Any) -> tuple[dict[str, list[Any]], bool, str | None]:
    """Columns of rows as lists, whether there were several rows, and the kind of their tensors.

    Args:
        encoded: A dictionary of rows, or of one row; or a list of dictionaries of one row each.

    Raises:
        TokenizerError: It is neither.
    """
    if isinstance(encoded, Mapping):
        given: Mapping[str, Any] = cast("Mapping[str, Any]", encoded)
        columns = {name: _listed(column) for name, column in given.items()}
        ids: list[Any] = columns.get("input_ids") or [[]]
        is_batch, kind = isinstance(ids[0], list | tuple), _kind(given.get("input_ids"))
        return (columns if is_batch else {n: [c] for n, c in columns.items()}), is_batch, kind
    rows: list[Any] = list(encoded)
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise TokenizerError("pad: expected a dictionary of rows, or a list of dictionaries")
    columns = {name: [_listed(row[name]) for row in rows] for name in rows[0]}
    return columns, True, _kind(rows[0].get("input_ids"))


def _kind(values: Any) -> str | None:
    """The word for a tensor's framework, or None for what is no tensor."""
    items = cast("list[Any]", values) if isinstance(values, list) else [values]
    first = items[0] if items else None
    kinds = {"numpy": "np", "torch": "pt", "tensorflow": "tf", "jaxlib": "jax", "jax": "jax"}
    return kinds.get(type(first).__module__.partition(".")[0])


def _listed(values: Any) -> Any:
    """Tensors, or a list of them, as lists; TensorFlow's have `numpy` and no `tolist`."""
    if isinstance(values, list):
        items = cast("list[Any]", values)
        return [_listed(item) for item in items] if items and hasattr(items[0], "shape") else items
    array = values.numpy() if hasattr(values, "numpy") else values
    return array.tolist() if hasattr(array, "tolist") else array
