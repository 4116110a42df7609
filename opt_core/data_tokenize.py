"""Text to ids in bulk: the ids of `OPTTokenizer`, several times as fast.

Byte-level BPE cuts a text into words and encodes each by itself. A corpus repeats its words, so
each one's ids are kept, and the cutting is left to Python's regular expressions. Only characters
whose class has not changed since Unicode 3.2 (of 2002) are cut here, because the tables of Python
and of the tokenizer's library may be of different age; a text with others goes to the library.
"""

import json
import re
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np

from opt_core.errors import DataError
from opt_core.tokenizer import OPTTokenizer

_KEPT = 1 << 18  # words whose ids are kept
_LONGEST = 64  # characters; longer words hardly come again
_EMOJI = "\U0001f300-\U0001f64f"


class BulkTokenizer:
    """Encodes texts without special tokens; a "</s>" in a text is four characters, no end of text.

    Args:
        tokenizer: Whose ids to give.

    Attributes:
        dtype: How an id is stored: two bytes where the vocabulary allows it.
        is_fast: Whether words are cut here; otherwise the library does all.
    """

    def __init__(self, tokenizer: OPTTokenizer) -> None:
        self._backend = tokenizer.backend()
        self._backend.encode_special_tokens = True
        self.dtype = np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<i4")
        self.is_fast = _cuts_as_gpt2(json.loads(self._backend.to_str()))
        self._words = _Words(self._encode)

    def __call__(self, text: str) -> bytes:
        """The ids of one text, as bytes of `dtype`."""
        if self.is_fast and not _unusual().search(text):
            return b"".join(map(self._words.__getitem__, _cutter(text.isascii()).findall(text)))
        return self._encode(text)

    def _encode(self, text: str) -> bytes:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return np.array(ids, self.dtype).tobytes()


class _Words(dict[str, bytes]):
    """The ids of each word, computed when it is first asked for."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = self._encode(word)
        if len(word) <= _LONGEST and len(self) < _KEPT:
            self[word] = ids
        return ids


def end_token(tokenizer: OPTTokenizer) -> int:
    """The id that goes between documents.

    Raises:
        DataError: The tokenizer names none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "documents need an end-of-text token between them, which this tokenizer lacks; name an "
            "eos_token in its tokenizer_config.json"
        )
    return tokenizer.eos_token_id


def start_tokens(tokenizer: OPTTokenizer) -> list[int]:
    """The ids before the first document: OPT's texts begin with `</s>`, Galactica's with none."""
    bos = tokenizer.bos_token_id
    return [bos] if tokenizer.add_bos and bos is not None else []


def _cuts_as_gpt2(contents: dict[str, Any]) -> bool:
    """Whether a tokenizer does nothing before BPE but cut as GPT-2 does."""
    cutter: dict[str, Any] = contents["pre_tokenizer"] or {}
    is_plain = cutter.get("type") == "ByteLevel" and cutter.get("use_regex", True)
    other_tokens = any(not token["special"] for token in contents["added_tokens"])
    return bool(
        is_plain
        and not cutter["add_prefix_space"]
        and contents["normalizer"] is None
        and not other_tokens
    )


@cache
def _cutter(is_ascii: bool) -> re.Pattern[str]:
    """GPT-2's pattern: contractions, and runs of letters, numbers, other characters and spaces."""
    if is_ascii:
        letters, numbers, spaces = "A-Za-z", "0-9", r"\s"
    else:
        letters, numbers = _ranges(_is_letter), _ranges(_is_number)
        spaces = _ranges(str.isspace)
    # No alternative begins as another one does, so the most frequent may come first.
    return re.compile(
        rf" ?[{letters}]+|'(?:[stmd]|re|ve|ll)| ?[{numbers}]+| ?[^{spaces}{letters}{numbers}]+|"
        r"\s+(?!\S)|\s+"
    )


@cache
def _unusual() -> re.Pattern[str]:
    """Finds a character that is not certain to be of one class for everybody."""
    return re.compile(f"[^{_ranges(_is_certain)}{_EMOJI}]")


def _is_letter(character: str) -> bool:
    return unicodedata.category(character)[0] == "L"


def _is_number(character: str) -> bool:
    return unicodedata.category(character)[0] == "N"


def _is_certain(character: str) -> bool:
    before, now = unicodedata.ucd_3_2_0.category(character), unicodedata.category(character)
    # Python counts the four separators as spaces, the library does not.
    return before not in ("Cn", "Cs") and before[0] == now[0] and not "\x1c" <= character <= "\x1f"


def _ranges(holds: Callable[[str], bool]) -> str:
    """The characters of the first plane for which something holds, for a set in a pattern."""
    found: list[str] = []
    for is_in, group in groupby(range(1 << 16), lambda code: holds(chr(code))):
        codes = [*group]
        if is_in:
            found.append(rf"\u{codes[0]:04x}-\u{codes[-1]:04x}")
    return "".join(found)
