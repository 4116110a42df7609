"""Numbers of a few bits, one after the other in 32-bit words."""

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
    # As many words as a number has bits hold 32 of them, the same way each time.
    turns = -(-count // WORD)
    plain = np.ascontiguousarray(words).view(np.uint32)
    missing = turns * bits - len(plain)
    plain = np.pad(plain, ((0, max(0, missing)), (0, 0)))[: turns * bits]
    grouped = plain.reshape(turns, bits, -1)
    out: NDArray[np.uint8] = np.empty((turns, WORD, grouped.shape[-1]), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for k in range(WORD):
        word, start = divmod(k * bits, WORD)
        value = grouped[:, word] >> np.uint32(start)
        if start + bits > WORD:
            value |= grouped[:, word + 1] << np.uint32(WORD - start)
        out[:, k] = value & mask
    return out.reshape(turns * WORD, -1)[:count]
