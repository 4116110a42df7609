"""Text to ids and back: OPT's byte-level BPE, with the ids `transformers` gives.

Two things are done here rather than by the library underneath: the beginning-of-text token is put
in front exactly once, whatever the files' own post-processor does, and ids are turned into bytes,
so that streaming, stop strings and `decode` cannot disagree.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from opt_core.adapters.folders import tokenizer_folder
from opt_core.errors import TokenizerError
from opt_core.hub import TOKENIZER_FILES, resolve
from opt_core.text import byte_level, tokenizer_files
from opt_core.text.tokenizer_files import LoadedTokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


@dataclass(frozen=True)
class Encoding:
    """A batch of texts as ids; `model(**encoding)` passes both arrays by name.

    Attributes:
        input_ids: Ids, int32 [B, T], padded to the longest text.
        attention_mask: 1 where there is a token and 0 where there is padding, int32 [B, T].
    """

    input_ids: NDArray[np.int32]
    attention_mask: NDArray[np.int32]

    def keys(self) -> tuple[str, str]:
        """The two names, for `**`."""
        return ("input_ids", "attention_mask")

    def __getitem__(self, name: str) -> NDArray[np.int32]:
        """The array of that name, for `**`."""
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


class OPTTokenizer:
    """OPT's tokenizer; also Galactica's and those of fine-tunes. Made by `from_pretrained`.

    Args:
        loaded: What `opt_core.text.tokenizer_files.load` read.

    Attributes:
        add_bos: Whether a text starts with the beginning-of-text token (OPT yes, Galactica no).
    """

    def __init__(self, loaded: LoadedTokenizer) -> None:
        self._loaded = loaded
        self._backend = loaded.backend
        self.add_bos = loaded.add_bos

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | PathLike[str], **hub: Any) -> "OPTTokenizer":
        """Reads a tokenizer from a folder or a hub repository.

        Args:
            path_or_hub_id: Folder, hub id such as "facebook/opt-125m", or "mini".
            **hub: `revision`, `token`, `local_files_only`, as in `opt_core.hub.resolve`.

        Raises:
            TokenizerError: Its files are missing, damaged, or describe no byte-level BPE.
        """
        path = resolve(path_or_hub_id, files=(), optional=TOKENIZER_FILES, **hub)
        path = tokenizer_folder(path, **hub)
        return cls(tokenizer_files.load(path if path.is_dir() else path.parent))

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes the files `transformers` reads into a folder (made if missing)."""
        tokenizer_files.save(self._loaded, Path(folder))

    @property
    def vocab_size(self) -> int:
        """The largest id plus one, added tokens included; the model may have more rows."""
        return len(self._bytes)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-text token (2 for OPT)."""
        return self._id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-text token (2, for OPT the same one)."""
        return self._id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id that padding is made of (1 for OPT)."""
        return self._id("pad_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the unknown token; byte-level BPE never needs it."""
        return self._id("unk_token")

    def is_special(self, token_id: int) -> bool:
        """Whether an id is a special token, which `decode` leaves out by default."""
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
                f"no token has id {token_id}; expected 0 <= id < {self.vocab_size} (a model may "
                "have more rows than its tokenizer has tokens; those were never trained)"
            )
        return b"" if skip_special_tokens and token_id in self._special_ids else token

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text.

        Args:
            text: Any text. Where it spells a special token ("</s>"), that one's id stands for it.
            add_special_tokens: Whether to begin with the beginning-of-text token, where the model
                expects one.

        Raises:
            TokenizerError: `text` is not a string, or contains half of a surrogate pair.
        """
        return self._prefix(add_special_tokens) + self._ids([text])[0]

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        padding_side: Literal["left", "right"] = "right",
        add_special_tokens: bool = True,
        max_length: int | None = None,
        truncation: bool = False,
    ) -> Encoding:
        """Encodes one text or several as one padded batch.

        Args:
            text: One text (B = 1) or several.
            text_pair: As many second texts, each to follow its first one. The beginning-of-text
                token is put before the second one too, as OPT's original tokenizer did.
            padding_side: Where padding goes: "left" for generation, "right" for training.
            add_special_tokens: Whether to begin with the beginning-of-text token, where the model
                expects one.
            max_length: Most tokens a row may have; None means no limit.
            truncation: Whether to cut the end off longer rows (of the second text, for a pair).

        Returns:
            Ids and mask, both int32 [B, T], whatever B is.

        Raises:
            TokenizerError: A text is no string, the texts do not pair up, a row is longer than
                `max_length` without `truncation`, or padding is needed and has no token.
        """
        if padding_side not in ("left", "right"):
            raise TokenizerError(
                f'padding_side: expected "left" or "right", received {padding_side!r}'
            )
        if truncation and max_length is None:
            raise TokenizerError("truncation=True needs max_length")
        rows = self._rows(_texts(text, "text"), add_special_tokens)
        if text_pair is not None:
            seconds = self._rows(_texts(text_pair, "text_pair"), add_special_tokens)
            if len(rows) != len(seconds):
                raise TokenizerError(
                    f"text_pair: expected {len(rows)} texts, like text, received {len(seconds)}"
                )
            rows = [first + second for first, second in zip(rows, seconds, strict=True)]
        if max_length is not None:
            rows = [_limited(row, i, max_length, truncation) for i, row in enumerate(rows)]
        return self._padded(rows, padding_side)

    def decode(self, ids: Any, skip_special_tokens: bool = True) -> str:
        """The text of one row of ids.

        Bytes that are no valid UTF-8 become U+FFFD; no spaces are cleaned up.

        Args:
            ids: Ids [T] or one id: a list, a NumPy array, or a tensor of any framework.
            skip_special_tokens: Whether to leave special tokens out.

        Raises:
            TokenizerError: `ids` is not a row of integers, or no token has one of them.
        """
        array = _id_array(ids)
        if array.ndim > 1:
            raise TokenizerError(
                f"ids: expected one row, received shape {array.shape}; use batch_decode"
            )
        row: list[int] = array.reshape(-1).tolist()
        pieces = (self.token_bytes(token_id, skip_special_tokens) for token_id in row)
        return b"".join(pieces).decode("utf-8", errors="replace")

    def batch_decode(self, ids: Any, skip_special_tokens: bool = True) -> list[str]:
        """The text of every row of ids [B, T] (or of rows of different lengths); see `decode`."""
        rows: list[Any] = list(ids)
        if any(_id_array(row).ndim != 1 for row in rows):
            raise TokenizerError("ids: expected a batch of rows; for a single row use decode")
        return [self.decode(row, skip_special_tokens) for row in rows]

    def backend(self) -> "Tokenizer":
        """A copy of the library's tokenizer underneath: for offsets, or other settings than ours.

        Its ids begin with no special token unless it is asked for them.
        """
        return copy.deepcopy(self._backend)

    def _id(self, name: str) -> int | None:
        token = self._loaded.named.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _prefix(self, add_special_tokens: bool) -> list[int]:
        bos = self.bos_token_id
        return [bos] if add_special_tokens and self.add_bos and bos is not None else []

    def _rows(self, texts: Sequence[str], add_special_tokens: bool) -> list[list[int]]:
        prefix = self._prefix(add_special_tokens)
        return [prefix + ids for ids in self._ids(texts)]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        for i, text in enumerate(texts):
            self._check_text(text, i)
        if len(texts) == 1:  # without the library's threads, which forbid a later fork
            return [self._backend.encode(texts[0], add_special_tokens=False).ids]
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def _check_text(self, text: Any, i: int) -> None:
        if not isinstance(text, str):
            raise TokenizerError(f"text {i}: expected a string, received {type(text).__name__}")
        try:
            encoded = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"text {i}: character {error.start} ({text[error.start]!r}) is half of a surrogate "
                "pair and has no UTF-8 form; replace it"
            ) from None
        if self._unencodable_bytes and not self._unencodable_bytes.isdisjoint(encoded):
            lost = next(byte for byte in encoded if byte in self._unencodable_bytes)
            raise TokenizerError(f"text {i}: the vocabulary has no token for its byte 0x{lost:02x}")

    def _padded(self, rows: list[list[int]], side: Literal["left", "right"]) -> Encoding:
        width = max(map(len, rows))
        pad = self.pad_token_id
        if pad is None and min(map(len, rows)) < width:
            raise TokenizerError(
                f"{self._loaded.source}: texts of different lengths need a pad_token, which this "
                "tokenizer lacks; name one in tokenizer_config.json"
            )
        input_ids = np.full((len(rows), width), 0 if pad is None else pad, np.int32)
        attention_mask = np.zeros_like(input_ids)
        for i, row in enumerate(rows):
            place = slice(width - len(row), None) if side == "left" else slice(len(row))
            input_ids[i, place] = row
            attention_mask[i, place] = 1
        return Encoding(input_ids, attention_mask)

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder().items()
        named = (self._backend.token_to_id(token) for token in self._loaded.named.values())
        return frozenset([index for index, token in added if token.special]).union(
            index for index in named if index is not None
        )

    @cached_property
    def _bytes(self) -> list[bytes | None]:
        return byte_level.token_table(self._backend)

    @cached_property
    def _unencodable_bytes(self) -> frozenset[int]:
        return byte_level.unencodable_bytes(self._backend)


def _texts(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise TokenizerError(
            f"{name}: expected a string or a sequence of strings, received {type(value).__name__}"
        )
    texts: list[str] = list(value)  # type: ignore[arg-type]
    if not texts:
        raise TokenizerError(f"{name}: expected at least one text, received none")
    return texts


def _limited(row: list[int], i: int, max_length: int, truncation: bool) -> list[int]:
    if max_length < 1:
        raise TokenizerError(f"max_length: expected at least 1, received {max_length}")
    if len(row) > max_length and not truncation:
        raise TokenizerError(
            f"text {i} has {len(row)} tokens, more than max_length={max_length}; shorten it or "
            "pass truncation=True to cut its end off"
        )
    return row[:max_length]


def _id_array(ids: Any) -> NDArray[Any]:
    """Any framework's ids as NumPy integers; `tolist` brings tensors over from an accelerator."""
    array: NDArray[Any] = np.asarray(ids.tolist() if hasattr(ids, "tolist") else ids)
    if array.dtype.kind not in "iu" and array.size:
        raise TokenizerError(f"ids: expected integers, received {array.dtype}")
    return array
