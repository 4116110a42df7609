"""Ids to text one token at a time: streaming output, and stop strings.

A token of byte-level BPE may end inside a character, so both work on bytes: no character is ever
split, and a stop string is found wherever the tokens happen to break it.
"""

import codecs
from collections.abc import Iterable
from typing import Any

from opt_core.errors import GenerationError
from opt_core.text.adapter import as_tokenizer
from opt_core.text.tokenizer import OPTTokenizer


class Detokenizer:
    """Turns one row of ids into text as they come; the pieces add up to what `decode` gives.

    Args:
        tokenizer: Whose ids they are.
        skip_special_tokens: Whether to leave special tokens out.
    """

    def __init__(self, tokenizer: OPTTokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = as_tokenizer(tokenizer)
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Takes the row's next id and returns the text that is now certain, which may be none.

        Raises:
            TokenizerError: No token has this id.
        """
        return self._decoder.decode(
            self._tokenizer.token_bytes(int(token_id), self._skip_special_tokens)
        )

    def flush(self) -> str:
        """Ends the row: the rest of it, U+FFFD for a character that was never finished."""
        return self._decoder.decode(b"", final=True)


class StopStringTracker:
    """Tells, for one row, when a newly generated token completes a stop string.

    As with `transformers`' `StopStringCriteria`, the string may begin and end anywhere inside a
    token, and special tokens count with their text. Only what is pushed is searched: unlike there,
    the end of the prompt is no part of a match.

    Args:
        tokenizer: Whose ids will be pushed.
        stop_strings: One or several strings, none of them empty.

    Raises:
        GenerationError: There is no stop string, or one is empty or no string.
    """

    def __init__(self, tokenizer: OPTTokenizer, stop_strings: str | Iterable[str]) -> None:
        given: Iterable[Any] = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        strings = list(given)
        for string in strings:
            if not isinstance(string, str) or not string:
                raise GenerationError(
                    f"stop_strings: expected non-empty strings, received {string!r}"
                )
        if not strings:
            raise GenerationError("stop_strings: expected at least one string, received none")
        self._tokenizer = as_tokenizer(tokenizer)
        self._stops = [string.encode("utf-8", errors="surrogatepass") for string in strings]
        self._tail = b""

    def push(self, token_id: int) -> bool:
        """Takes the row's next id and returns whether a stop string ends within that token.

        Raises:
            TokenizerError: No token has this id.
        """
        new = self._tokenizer.token_bytes(int(token_id), skip_special_tokens=False)
        text = self._tail + new
        self._tail = text[max(0, len(text) - max(map(len, self._stops)) + 1) :]
        # A match has to end in the new bytes, so it starts no earlier than this.
        return any(
            stop in text[max(0, len(text) - len(new) - len(stop) + 1) :] for stop in self._stops
        )
