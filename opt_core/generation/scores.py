"""Scores of generated tokens, out of what `generate` kept."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def transition_scores(
    sequences: NDArray[np.integer],
    scores: Sequence[Floats],
    beam_indices: NDArray[np.integer] | None = None,
    normalize_logits: bool = False,
) -> Floats:
    """The score of each generated token.

    Args:
        sequences: (R, T + new) ids.
        scores: Of each step the scores (rows, V) of all rows or beams.
        beam_indices: (R, new) rows of `scores` that each token came from, -1 behind a row's end;
            None: each row's own.
        normalize_logits: Make log-probabilities of the scores first.

    Returns:
        (R, new), 0 behind the end of a beam.
    """
    steps = [np.asarray(step, np.float32) for step in scores]
    if normalize_logits:
        steps = [step - np.logaddexp.reduce(step, 1, keepdims=True) for step in steps]
    R, new = len(sequences), len(steps)
    if beam_indices is None:
        rows = np.arange(R)[:, None].repeat(new, 1)
    else:
        new = int((beam_indices >= 0).sum(1).max())
        rows = np.asarray(beam_indices)[:, :new]
    ids = sequences[:, sequences.shape[1] - new :]
    found = np.zeros((R, new), np.float32)
    for step in range(new):
        is_made = rows[:, step] >= 0
        found[is_made, step] = steps[step][rows[is_made, step], ids[is_made, step]]
    return found
