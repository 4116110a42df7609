"""Cleaning: characters that belong in no text, and documents that are not worth keeping."""

import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from opt_core.errors import DataError

# Control characters but tab and line feed, halves of surrogate pairs, the byte-order mark and what
# Unicode says is no character. Joiners stay: emoji and several scripts need them.
_NO_TEXT = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufeff\ufdd0-\ufdef\ufffe\uffff]")
_NEWLINES = re.compile(r"\r\n?")


@dataclass(frozen=True)
class Cleaning:
    """Rules of cleaning: changes to documents, and which of them to drop.

    Attributes:
        normalization: Unicode normalisation form, or None to leave characters as they are.
        min_chars: Documents with fewer characters, spaces at their ends not counted, are dropped.
        max_chars: Longer documents are dropped; None: no limit.
        max_repetition: Documents in which a larger share of the five-word sequences repeats an
            earlier one are dropped; 1 keeps all.
        near_duplicates: Documents that share at least this part of their five-word sequences with
            an earlier one (Jaccard similarity, estimated) are dropped; 1 drops equal ones only.
        duplicates: Whether documents equal to an earlier one are dropped at all.

    Raises:
        DataError: A value out of range.
    """

    normalization: Literal["NFC", "NFKC"] | None = "NFC"
    min_chars: int = 1
    max_chars: int | None = None
    max_repetition: float = 0.5
    near_duplicates: float = 0.8
    duplicates: bool = True

    def __post_init__(self) -> None:
        if self.normalization not in ("NFC", "NFKC", None):
            raise DataError(
                f"normalization: expected NFC, NFKC or none, received {self.normalization!r}"
            )
        if self.min_chars < 1:
            raise DataError(f"min_chars: expected at least 1, received {self.min_chars}")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise DataError(
                f"max_chars: expected at least min_chars={self.min_chars}, "
                f"received {self.max_chars}"
            )
        if not 0 <= self.max_repetition <= 1:
            raise DataError(f"max_repetition: expected 0..1, received {self.max_repetition}")
        if not 0.5 <= self.near_duplicates <= 1:
            raise DataError(f"near_duplicates: expected 0.5..1, received {self.near_duplicates}")


def clean(text: str, cleaning: Cleaning) -> tuple[str, int]:
    """A document as it is kept, and how many characters were taken out of it.

    Line ends become line feeds, spaces at the end go (as in OPT's own training data), and empty
    lines at the start.
    """
    text = _NEWLINES.sub("\n", text)
    text, removed = _NO_TEXT.subn("", text)
    if cleaning.normalization is not None:
        text = unicodedata.normalize(cleaning.normalization, text)
    text = text.rstrip()
    first = len(text) - len(text.lstrip())
    return text[text.rfind("\n", 0, first) + 1 :], removed


def length_problem(text: str, cleaning: Cleaning) -> str | None:
    """Why a cleaned document's length speaks against it, or None."""
    length = len(text.strip())
    if not length:
        return "empty"
    if length < cleaning.min_chars:
        return "too short"
    if cleaning.max_chars is not None and length > cleaning.max_chars:
        return "too long"
    return None
