"""Tokens in, training batches out."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import InputError


def token_batches(
    tokens: NDArray[np.integer[Any]], batch_size: int, sequence_length: int, seed: int = 0
) -> Iterator[NDArray[np.int32]]:
    """Draws windows of a token stream at random places, without end.

    Args:
        tokens: One stream of ids, (length,).
        batch_size: Rows B of a batch.
        sequence_length: Tokens T of a row.
        seed: The same seed gives the same batches.

    Yields:
        int32 ids (B, T).

    Raises:
        InputError: The stream is shorter than one window.
    """
    places = len(tokens) - sequence_length + 1
    if places < 1:
        raise InputError(
            f"a stream of {len(tokens)} tokens is shorter than sequence_length={sequence_length}"
        )
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(0, places, batch_size)
        yield np.stack([tokens[s : s + sequence_length] for s in starts]).astype(np.int32)


def token_windows(
    tokens: NDArray[np.integer[Any]], batch_size: int, sequence_length: int
) -> Iterator[NDArray[np.int32]]:
    """Cuts a token stream into consecutive windows, for evaluation.

    A remainder shorter than a window is dropped.

    Args:
        tokens: One stream of ids, (length,).
        batch_size: Most rows of a batch.
        sequence_length: Tokens T of a row.

    Yields:
        int32 ids (at most `batch_size`, T).
    """
    count = len(tokens) // sequence_length
    rows = tokens[: count * sequence_length].reshape(count, sequence_length).astype(np.int32)
    for start in range(0, count, batch_size):
        yield rows[start : start + batch_size]
