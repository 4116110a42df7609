"""Text to ids in bulk: the ids of `OPTTokenizer`, several times as fast.

Byte-level BPE cuts a text into words and encodes each by itself. A corpus repeats its words, so
the ids of each are kept, and of whatever is between two spaces; the cutting is left to Python's
regular expressions. Only characters whose class has not changed since Unicode 3.2 (of 2002) are cut
here, because the tables of Python and of the tokenizer's library may be of different age; a text
with others goes to the library.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import groupby
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

from opt_core.errors import DataError
from opt_core.text.adapter import as_tokenizer
from opt_core.text.byte_level import byte_level_encode
from opt_core.text.tokenizer import OPTTokenizer

_MOST_WORDS = 1 << 18  # words whose ids are kept
_LONGEST_WORD = 64  # characters; longer words hardly come again
_PLANE = range(1 << 16)
_START, _NO_START = re.compile(r" (?=\S)"), re.compile(r" (?!\S)")
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
        tokenizer = as_tokenizer(tokenizer)
        self._backend = tokenizer.backend()
        self._backend.encode_special_tokens = True
        self._model: Any = self._backend.model
        self.dtype = np.dtype("<u2" if tokenizer.id_limit <= 1 << 16 else "<i4")
        self.is_fast = _splits_like_gpt2(self._backend)
        self._words = _IdCache(self._encode_word)
        self._pieces = _IdCache(lambda piece: self._encode_words(f" {piece}"))

    def __call__(self, text: str) -> bytes:
        """The ids of one text, as bytes of `dtype`."""
        if not self.is_fast or not (text.isascii() or not _unusual().search(text)):
            return self._encode(text)
        # A space before another character begins a word wherever it is, so that a text can be cut
        # there; `str.split` is faster where it does the same.
        first, *pieces = _START.split(text) if _NO_START.search(text) else text.split(" ")
        return self._encode_words(first) + b"".join(map(self._pieces.__getitem__, pieces))

    def _encode_words(self, text: str) -> bytes:
        return b"".join(map(self._words.__getitem__, _word_pattern(text.isascii()).findall(text)))

    def _encode(self, text: str) -> bytes:
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return np.array(ids, self.dtype).tobytes()

    def _encode_word(self, word: str) -> bytes:
        """The ids of what `_word_pattern` cut: straight from BPE, a third of the time."""
        tokens = self._model.tokenize(byte_level_encode(word.encode()))
        return np.array([token.id for token in tokens], self.dtype).tobytes()


class _IdCache(dict[str, bytes]):
    """The ids of each word, computed when it is first asked for."""

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        ids = self._encode(word)
        if len(word) <= _LONGEST_WORD and len(self) < _MOST_WORDS:
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


def _splits_like_gpt2(backend: Any) -> bool:
    """Whether a tokenizer does nothing before BPE but cut as GPT-2 does."""
    cutter = backend.pre_tokenizer
    return bool(
        isinstance(cutter, ByteLevel)
        and cutter.use_regex
        and not cutter.add_prefix_space
        and backend.normalizer is None
        and all(token.special for token in backend.get_added_tokens_decoder().values())
    )


@cache
def _word_pattern(is_ascii: bool) -> re.Pattern[str]:
    """GPT-2's pattern: contractions, and runs of letters, numbers, other characters and spaces."""
    if is_ascii:
        letters, numbers, spaces = "A-Za-z", "0-9", r"\s"
    else:
        letters, numbers = (_ranges(_classes(), kind) for kind in "LN")
        spaces = _ranges(["x" if chr(code).isspace() else "" for code in _PLANE], "x")
    # No alternative begins as another one does, so the most frequent may come first.
    return re.compile(
        rf" ?[{letters}]+|'(?:[stmd]|re|ve|ll)| ?[{numbers}]+| ?[^{spaces}{letters}{numbers}]+|"
        r"\s+(?!\S)|\s+",
        re.ASCII if is_ascii else 0,  # there, `\s` is what the library takes for a space
    )


@cache
def _unusual() -> re.Pattern[str]:
    """Finds a character that is not certain to be of one class for everybody."""
    before = map(unicodedata.ucd_3_2_0.category, map(chr, _PLANE))
    certain = [
        "x" if was not in ("Cn", "Cs") and was[0] == now else ""
        for was, now in zip(before, _classes(), strict=True)
    ]
    # Python counts the four separators as spaces, the library does not.
    certain[0x1C:0x20] = [""] * 4
    return re.compile(f"[^{_ranges(certain, 'x')}{_EMOJI}]")


@cache
def _classes() -> list[str]:
    """The class of each character of the first plane: L for letters, N for numbers, ..."""
    return [unicodedata.category(chr(code))[0] for code in _PLANE]


def _ranges(classes: list[str], wanted: str) -> str:
    """The characters of one class, for a set in a pattern."""
    found: list[str] = []
    start = 0
    for kind, group in groupby(classes):
        end = start + sum(1 for _ in group)
        if kind == wanted:
            found.append(rf"\u{start:04x}-\u{end - 1:04x}")
        start = end
    return "".join(found)
