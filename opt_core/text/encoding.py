"""Texts as ids: the result of a call of a tokenizer."""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.compatibility.kinds import EncodingKind
from opt_core.errors import TokenizerError
from opt_core.text import tensors
from opt_core.text.assembly import NO_PAD_TOKEN

if TYPE_CHECKING:
    from tokenizers import Encoding as LibraryEncoding


class Rows(list[Any]):
    """One list for each text, of different lengths; and one padded array for whoever wants that.

    It is a list of lists in every respect. NumPy, and so every model here, sees a single array:
    int32 [B, T], the shorter rows filled up. `shape` and an index of two numbers are that array's.

    Args:
        rows: The lists.
        fill: What to fill up with; None where the tokenizer has no padding token.
        side: Where to fill up, "left" or "right".
    """

    def __init__(self, rows: Iterable[Any], fill: int | None, side: str) -> None:
        super().__init__(rows)
        self.fill, self.side = fill, side

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        rows: list[list[int]] = list(self)
        return filled(rows, self.fill, self.side).astype(np.int32 if dtype is None else dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows B and tokens T of the longest one."""
        return (len(self), max(map(len, self), default=0))

    def __getitem__(self, index: Any) -> Any:
        return np.asarray(self)[index] if isinstance(index, tuple) else super().__getitem__(index)


def filled(rows: list[list[int]], fill: int | None, side: str) -> NDArray[np.int32]:
    """Rows as one array, the shorter ones filled up.

    Raises:
        TokenizerError: Rows of different lengths, and nothing to fill up with.
    """
    width = max(map(len, rows), default=0)
    if fill is None and any(len(row) < width for row in rows):
        raise TokenizerError(NO_PAD_TOKEN)
    array = np.full((len(rows), width), fill or 0, np.int32)
    for i, row in enumerate(rows):
        array[i, slice(width - len(row), None) if side == "left" else slice(len(row))] = row
    return array


class CharSpan(NamedTuple):
    """Characters of a text.

    Attributes:
        start: The first.
        end: The one after the last.
    """

    start: int
    end: int


class TokenSpan(NamedTuple):
    """Tokens of a row.

    Attributes:
        start: The first.
        end: The one after the last.
    """

    start: int
    end: int


class Encoding(EncodingKind, dict[str, Any]):
    """The ids of texts: a dictionary, as `model(**encoding)` and `map` take it.

    Its entries are attributes as well (`encoding.input_ids`). Which there are, and whether they
    are lists or tensors, is said at `OPTTokenizer.__call__`.

    Args:
        values: The entries.
        encodings: What the tokenizer's library made of each row, for `word_ids` and its like.
    """

    def __init__(
        self,
        values: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
        encodings: "list[LibraryEncoding] | None" = None,
    ) -> None:
        super().__init__(values)
        self._encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            there = ", ".join(self) or "nothing"
            raise AttributeError(f"this encoding has no {name!r}; it has {there}") from None

    def __getitem__(self, key: Any) -> Any:
        """An entry by its name; of a number, what the library made of that row."""
        return self._row(key) if isinstance(key, int) else super().__getitem__(key)

    @property
    def data(self) -> dict[str, Any]:
        """The entries, as a dictionary."""
        return self

    @property
    def encodings(self) -> "list[LibraryEncoding] | None":
        """The rows as the tokenizer's library made them; None where it had no part."""
        return self._encodings

    @property
    def is_fast(self) -> bool:
        """Whether `word_ids` and its like can be asked for."""
        return self._encodings is not None

    @property
    def n_sequences(self) -> int | None:
        """Texts of a row: 1, or 2 for pairs."""
        return self._encodings[0].n_sequences if self._encodings else None

    def tokens(self, batch_index: int = 0) -> list[str]:
        """The tokens of a row, as the vocabulary spells them."""
        return self._row(batch_index).tokens

    def word_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token the word it is of; None for a special token."""
        return self._row(batch_index).word_ids

    def sequence_ids(self, batch_index: int = 0) -> list[int | None]:
        """For each token the text of a pair it is of, 0 or 1; None for a special token."""
        return self._row(batch_index).sequence_ids

    def char_to_token(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The token that a character of a text is in; given one number, of the first row."""
        row, place = _row_and_place(batch_or_char_index, char_index)
        return self._row(row).char_to_token(place, sequence_index)

    def token_to_chars(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> "CharSpan | None":
        """The first character of a token and the one after its last, as `start` and `end`.

        None for a special token.
        """
        row, place = _row_and_place(batch_or_token_index, token_index)
        found = self._row(row).token_to_chars(place)
        span = found[1] if found is not None and isinstance(found[1], tuple) else found
        return None if span is None else CharSpan(*span)

    def words(self, batch_index: int = 0) -> list[int | None]:
        """`word_ids`, as it was called before."""
        return self.word_ids(batch_index)

    def token_to_sequence(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """The text of a pair that a token is of, 0 or 1; None for a special token."""
        row, place = _row_and_place(batch_or_token_index, token_index)
        return self._row(row).token_to_sequence(place)

    def token_to_word(
        self, batch_or_token_index: int, token_index: int | None = None
    ) -> int | None:
        """The word that a token is of; None for a special token."""
        row, place = _row_and_place(batch_or_token_index, token_index)
        return self._row(row).word_ids[place]

    def word_to_tokens(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> "TokenSpan | None":
        """The first token of a word and the one after its last, as `start` and `end`."""
        row, place = _row_and_place(batch_or_word_index, word_index)
        found = self._row(row).word_to_tokens(place, sequence_index)
        return None if found is None else TokenSpan(*found)

    def word_to_chars(
        self, batch_or_word_index: int, word_index: int | None = None, sequence_index: int = 0
    ) -> "CharSpan | None":
        """The first character of a word and the one after its last, as `start` and `end`."""
        row, place = _row_and_place(batch_or_word_index, word_index)
        found = self._row(row).word_to_chars(place, sequence_index)
        return None if found is None else CharSpan(*found)

    def char_to_word(
        self, batch_or_char_index: int, char_index: int | None = None, sequence_index: int = 0
    ) -> int | None:
        """The word that a character is of."""
        row, place = _row_and_place(batch_or_char_index, char_index)
        return self._row(row).char_to_word(place, sequence_index)

    def convert_to_tensors(
        self, tensor_type: Any = None, prepend_batch_axis: bool = False, **_: Any
    ) -> "Encoding":
        """Makes tensors of the entries, in place.

        Args:
            tensor_type: "np", "pt", "tf" or "jax"; None changes nothing.
            prepend_batch_axis: Whether the entries are one row's, to become [1, T].

        Raises:
            TokenizerError: No such framework, or rows of different lengths.
        """
        if tensor_type is not None:
            make = tensors.maker(tensor_type)
            given = {n: [v] if prepend_batch_axis else v for n, v in self.items()}
            self.update({name: _tensor(name, value, make) for name, value in given.items()})
        return self

    def to(self, device: Any, **_: Any) -> "Encoding":
        """Moves the tensors that can be moved (PyTorch's, JAX') to a device, in place."""
        for name, value in self.items():
            if hasattr(value, "to"):
                self[name] = value.to(device)
            elif hasattr(value, "to_device") and not isinstance(value, np.ndarray | list):
                self[name] = value.to_device(device)
        return self

    def __copy__(self) -> "Encoding":
        return Encoding(self, self._encodings)

    def copy(self) -> "Encoding":
        """The same entries in another dictionary."""
        return self.__copy__()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Encoding, (dict(self), self._encodings))

    def _row(self, index: int) -> "LibraryEncoding":
        if self._encodings is None:
            raise TokenizerError("this encoding was not made of texts: it has no words")
        return self._encodings[index]


def _row_and_place(first: int, second: int | None) -> tuple[int, int]:
    """A row and a place in it; given one number, it is a place in the first row."""
    return (0, first) if second is None else (first, second)


def _tensor(name: str, value: Any, make: Callable[[NDArray[Any]], Any]) -> Any:
    if not isinstance(value, list | tuple | np.ndarray):
        return value
    try:
        # As an ordinary list: rows of different lengths are padded only where that is asked for.
        array = np.asarray(list(cast("list[Any]", value)))
    except ValueError:
        raise TokenizerError(
            f"{name}: rows of different lengths are no tensor; pass padding=True, and "
            "truncation=True with max_length, to make them one"
        ) from None
    if array.dtype.kind not in "iufb":
        raise TokenizerError(f"{name}: expected numbers, received {array.dtype}; leave it out")
    return make(array)
