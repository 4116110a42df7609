"""Numbers of a few bits, one after the other in 32-bit words."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

WORD = 32


def words_for(count: int, bits: int) -> int:
    """Words that so many numbers take."""
    return -(-count * bits // WORD)


def unpack_bits(words: NDArray[Any], bits: int, count: int) -> NDArray[np.uint8]:
    """The numbers along the first axis, the earliest in the lowest bits of the first word.

    A number may lie in two words, as those of 3 bits do.

    Args:
        words: int32 (W, N), or more of them than needed.
        bits: Of a number, 1 to 8.
        count: Numbers there are.

    Returns:
        uint8 (count, N).
    """
    # Some words hold a whole number of numbers, the same way each time.
    in_turn = WORD // math.gcd(bits, WORD)
    turns, size = -(-count // in_turn), in_turn * bits // WORD
    plain = np.ascontiguousarray(words).view(np.uint32)
    missing = turns * size - len(plain)
    plain = np.pad(plain, ((0, max(0, missing)), (0, 0)))[: turns * size]
    grouped = plain.reshape(turns, size, -1)
    out: NDArray[np.uint8] = np.empty((turns, in_turn, grouped.shape[-1]), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for k in range(in_turn):
        word, start = divmod(k * bits, WORD)
        value = grouped[:, word] >> np.uint32(start)
        if start + bits > WORD:
            value |= grouped[:, word + 1] << np.uint32(WORD - start)
        out[:, k] = value & mask
    return out.reshape(turns * in_turn, -1)[:count]


def pack_bits(numbers: NDArray[np.uint8], bits: int) -> NDArray[np.int32]:
    """The inverse of `unpack_bits`.

    Args:
        numbers: uint8 (count, N), each below `2 ** bits`.
        bits: Of a number, 1 to 8.

    Returns:
        int32 (W, N), zeros behind the last number.
    """
    in_turn = WORD // math.gcd(bits, WORD)
    turns, size = -(-len(numbers) // in_turn), in_turn * bits // WORD
    padded = np.pad(numbers, ((0, turns * in_turn - len(numbers)), (0, 0)))
    grouped = padded.reshape(turns, in_turn, -1)
    words: NDArray[np.uint32] = np.zeros((turns, size, grouped.shape[-1]), np.uint32)
    for k in range(in_turn):
        word, start = divmod(k * bits, WORD)
        value = grouped[:, k].astype(np.uint32)
        words[:, word] |= value << np.uint32(start)
        if start + bits > WORD:
            words[:, word + 1] |= value >> np.uint32(WORD - start)
    flat = words.reshape(turns * size, -1)[: words_for(len(numbers), bits)]
    return np.ascontiguousarray(flat).view(np.int32)
