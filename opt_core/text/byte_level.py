"""Byte-level BPE's alphabet: which bytes a token of the vocabulary stands for."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def token_table(backend: "Tokenizer") -> list[bytes | None]:
    """The bytes of every token, by id; None for an id that no token has."""
    added = set(backend.get_added_tokens_decoder())
    vocabulary = backend.get_vocab(with_added_tokens=True)
    table: list[bytes | None] = [None] * (max(vocabulary.values()) + 1)
    for token, index in vocabulary.items():
        table[index] = spelled_bytes(token, index in added)
    return table


def unencodable_bytes(backend: "Tokenizer") -> frozenset[int]:
    """Bytes that would silently vanish from a text: no token spells them, none means unknown."""
    if backend.normalizer is not None or backend.model.unk_token is not None:
        return frozenset()
    vocabulary = backend.get_vocab(with_added_tokens=False)
    return frozenset(byte for char, byte in _BYTE_OF_CHAR.items() if char not in vocabulary)


def byte_level_encode(data: bytes) -> str:
    """Bytes as the vocabulary writes them: a character for each."""
    return data.decode("latin-1").translate(_CHAR_OF_BYTE)


def _bytes_to_unicode() -> Iterator[tuple[str, int]]:
    """The character for each byte: printable ones stand for themselves, others get U+0100 and up.

    Defined by GPT-2's encoder (Radford et al. 2019, "Language Models are Unsupervised Multitask
    Learners"), which OPT's vocabulary was made with.
    """
    others = 0
    for byte in range(256):
        if byte in range(0x21, 0x7F) or (byte >= 0xA1 and byte != 0xAD):
            yield chr(byte), byte
        else:
            yield chr(0x100 + others), byte
            others += 1


_BYTE_OF_CHAR = dict(_bytes_to_unicode())
_CHAR_OF_BYTE = {byte: char for char, byte in _bytes_to_unicode()}


def spelled_bytes(token: str, is_added: bool = False) -> bytes:
    """The bytes of a token as the vocabulary spells it; of an added one, those of its text."""
    if is_added:
        return token.encode("utf-8")
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # not written in that alphabet: an entry that stands for itself
        return token.encode("utf-8")
