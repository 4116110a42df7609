"""Ids to text, whole."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import TokenizerError
from opt_core.text import byte_level
from opt_core.text.attributes import TokenizerAttributes

_PUNCTUATION = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")


class Decoding(TokenizerAttributes):
    """A tokenizer's way from ids to bytes and text."""

    @property
    def id_limit(self) -> int:
        """The largest id plus one, added tokens included; the model may have more rows."""
        return len(self._bytes)

    def is_special(self, token_id: int) -> bool:
        """Whether an id is a special token, which `decode` can leave out."""
        return token_id in self._special_ids

    def token_bytes(self, token_id: int, skip_special_tokens: bool = True) -> bytes:
        """The exact bytes of one token, which may end inside a character.

        Args:
            token_id: An id of this tokenizer.
            skip_special_tokens: Whether special tokens count as no bytes.

        Raises:
            TokenizerError: No token has this id.
        """
        token = self._bytes[token_id] if 0 <= token_id < len(self._bytes) else None
        if token is None:
            raise TokenizerError(
                f"no token has id {token_id}; expected 0 <= id < {self.id_limit} (a model may "
                "have more rows than its tokenizer has tokens; those were never trained)"
            )
        return b"" if skip_special_tokens and token_id in self._special_ids else token

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> Any:
        """The text of one row of ids; of several rows, a list of theirs.

        Bytes that are no valid UTF-8 become U+FFFD.

        Args:
            token_ids: Ids [T], [B, T] or one id: a list, a NumPy array, or a tensor of any
                framework.
            skip_special_tokens: Whether to leave special tokens out.
            clean_up_tokenization_spaces: True removes spaces before punctuation, which changes
                texts that had them.

        Raises:
            TokenizerError: These are no integers, or no token has one of them.
        """
        if _is_batch(token_ids):
            return self.batch_decode(token_ids, skip_special_tokens, clean_up_tokenization_spaces)
        row: list[int] = _id_array(token_ids).reshape(-1).tolist()
        pieces = (self.token_bytes(token_id, skip_special_tokens) for token_id in row)
        text = b"".join(pieces).decode("utf-8", errors="replace")
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def batch_decode(
        self,
        sequences: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **_: Any,
    ) -> list[str]:
        """The text of every row of ids [B, T] (or of rows of different lengths); see `decode`."""
        return [
            self.decode(row, skip_special_tokens, clean_up_tokenization_spaces)
            for row in list(sequences)
        ]

    def clean_up_tokenization(self, out_string: str) -> str:
        """A text without spaces before punctuation and English contractions."""
        text = out_string.replace(" ' ", "'")
        for mark in _PUNCTUATION:
            text = text.replace(f" {mark}", mark)
        return text

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        special = (i for i, token in self.added_tokens_decoder.items() if token.special)
        return frozenset([*special, *self.all_special_ids])

    @cached_property
    def _bytes(self) -> list[bytes | None]:
        return byte_level.token_table(self.loaded.backend)


def _is_batch(ids: Any) -> bool:
    """Whether these are rows, of one length or several."""
    if hasattr(ids, "shape"):
        return len(ids.shape) > 1
    rows = cast("Sequence[Any]", ids) if isinstance(ids, list | tuple) else ()
    return any(isinstance(row, list | tuple) or len(getattr(row, "shape", ())) for row in rows)


def _id_array(ids: Any) -> NDArray[Any]:
    """Any framework's ids as NumPy integers; `tolist` brings tensors over from an accelerator."""
    array: NDArray[Any] = np.asarray(ids.tolist() if hasattr(ids, "tolist") else ids)
    if array.dtype.kind not in "iu" and array.size:
        raise TokenizerError(f"ids: expected integers, received {array.dtype}")
    return array
