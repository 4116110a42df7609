"""Duplicates: equal documents by a digest, nearly equal ones by MinHash signatures.

A document is its set of shingles, sequences of five words, case and punctuation aside. The share of
equal entries in two signatures estimates the Jaccard similarity of two such sets (Broder 1997); to
find candidates without comparing all pairs, a signature is cut into bands, and documents that agree
in one whole band are compared (locality-sensitive hashing; Leskovec, Rajaraman and Ullman 2020, ch.
3). With 16 bands of 8, a pair of similarity 0.8 is compared with probability 0.95.

Sequences are hashed for many documents at a time, as polynomials over the bytes of their words.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHINGLE_WORDS = 5
"""Words in a shingle."""
BANDS, ROWS = 16, 8
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2 ** 64
_INVERSE = pow(_BASE, -1, 1 << 64)
_RNG = np.random.default_rng(20220502)
_FACTORS = _RNG.integers(0, 1 << 31, BANDS * ROWS, np.uint32) * 2 + 1
_SHIFTS = _RNG.integers(0, 1 << 32, BANDS * ROWS, np.uint32)
_WEIGHTS = _RNG.integers(0, 1 << 63, (BANDS, ROWS), np.uint64) * 2 + 1
_IS_WORD = np.zeros(256, bool)
_IS_WORD[[*b"0123456789abcdefghijklmnopqrstuvwxyz", *range(0x80, 0x100)]] = True


class Fingerprints(NamedTuple):
    """The digests and signatures that documents are compared by.

    Attributes:
        digests: 16 bytes each, the same for equal texts.
        repetition: Share of each document's word sequences that repeat an earlier one of it.
        signatures: MinHash, uint16 [documents, BANDS * ROWS]; zeros if there are fewer than five
            words.
        bands: One number per band of a signature, uint64 [documents, BANDS].
    """

    digests: list[bytes]
    repetition: NDArray[np.float64]
    signatures: NDArray[np.uint16]
    bands: NDArray[np.uint64]


def fingerprints(texts: Sequence[str]) -> Fingerprints:
    """Computes the fingerprints of some documents, together: a few megabytes at most."""
    digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts]
    hashes, documents = _shingles(texts)
    count = np.bincount(documents, minlength=len(texts))
    keys = np.sort(documents.astype(np.uint64) << np.uint64(44) | hashes >> np.uint64(20))
    repeated = keys[1:][keys[1:] == keys[:-1]] >> np.uint64(44)
    repeats = np.bincount(repeated.astype(np.int64), minlength=len(texts))
    signatures = np.zeros((len(texts), BANDS * ROWS), np.uint32)
    present = np.flatnonzero(count)
    if len(present):
        starts = np.r_[0, np.cumsum(count[present])[:-1]]
        values = (hashes >> np.uint64(32)).astype(np.uint32)
        for i, (factor, shift) in enumerate(zip(_FACTORS, _SHIFTS, strict=True)):
            signatures[present, i] = np.minimum.reduceat(values * factor + shift, starts)
    grouped = signatures.reshape(-1, BANDS, ROWS).astype(np.uint64)
    return Fingerprints(
        digests,
        repeats / np.maximum(count, 1),
        signatures.astype(np.uint16),
        _fmix64((grouped * _WEIGHTS).sum(-1, dtype=np.uint64)),
    )


class DuplicateFilter:
    """The documents so far; it holds some two kilobytes for each.

    Args:
        near_duplicates: Similarity from which a document counts as a duplicate; 1: equal ones only.
    """

    def __init__(self, near_duplicates: float) -> None:
        self._threshold = near_duplicates
        self._digests: set[bytes] = set()
        self._signatures: list[NDArray[np.uint16]] = []
        self._bands: dict[int, int] = {}

    def problem(self, found: Fingerprints, i: int) -> str | None:
        """Why a document is a duplicate of an earlier one; remembers it where it is none.

        Args:
            found: The fingerprints it is among.
            i: Which one it is.
        """
        digest = found.digests[i]
        if digest in self._digests:
            return "duplicate"
        self._digests.add(digest)
        signature = found.signatures[i]
        if self._threshold >= 1 or not signature.any():
            return None
        keys: list[int] = found.bands[i].tolist()
        for index in {*map(self._bands.get, keys)}:
            if index is not None and self._is_near(self._signatures[index], signature):
                return "near-duplicate"
        self._bands.update(dict.fromkeys(keys, len(self._signatures)))
        self._signatures.append(signature.copy())
        return None

    def _is_near(self, one: NDArray[np.uint16], other: NDArray[np.uint16]) -> bool:
        return bool((one == other).mean() >= self._threshold)


def _shingles(texts: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """The hash of every shingle, and the document each one is in."""
    parts = [text.lower().encode() for text in texts]
    data = np.frombuffer(b" ".join(parts) + b" ", np.uint8)
    ends_of_texts = np.cumsum([len(part) + 1 for part in parts])
    is_word = _IS_WORD[data]
    edges = np.flatnonzero(np.diff(is_word, prepend=False))
    starts, ends = edges[::2], edges[1::2]  # the last byte is a space: every word ends
    powers = _powers(_BASE, len(data))
    sums = np.zeros(len(data) + 1, np.uint64)
    np.cumsum((data.astype(np.uint64) + np.uint64(1)) * powers, out=sums[1:])
    words = (sums[ends] - sums[starts]) * _powers(_INVERSE, len(data))[starts]
    document = np.searchsorted(ends_of_texts, starts, side="right")
    if len(words) < SHINGLE_WORDS:
        return words[:0], document[:0]
    last = len(words) - SHINGLE_WORDS + 1
    hashes = np.zeros(last, np.uint64)
    for i in range(SHINGLE_WORDS):
        hashes = _fmix64(hashes + words[i : i + last])
    inside = document[:last] == document[SHINGLE_WORDS - 1 :]
    return hashes[inside], document[:last][inside]


_POWERS: dict[int, NDArray[np.uint64]] = {}


def _powers(base: int, count: int) -> NDArray[np.uint64]:
    """`base` to the power of 0, 1, ... modulo 2 ** 64."""
    known = _POWERS.get(base)
    if known is None or len(known) < count:
        known = np.full(max(count, 1 << 20), base, np.uint64)
        known[0] = 1
        np.multiply.accumulate(known, out=known)
        _POWERS[base] = known
    return known[:count]


def _fmix64(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spreads each number over all 64 bits (the finaliser of MurmurHash3)."""
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    values = (values ^ (values >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return values ^ (values >> np.uint64(33))
