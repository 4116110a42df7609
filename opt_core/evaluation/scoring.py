"""Scores of tokens, as far as they need no framework: every backend has a `scoring` module."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.generation.request import bucket

LOGITS = 1 << 24
"""Logits held at a time, whatever the length of the rows: 64 MiB in float32."""


def bucket_room(config: OPTConfig, length: int) -> int:
    """Tokens to fill rows up with on the right, so that few programs are compiled."""
    room = bucket(length) - length
    # A filled-up row must not need more positions, nor look longer to the classifier.
    is_impossible = length + room > config.max_position_embeddings or config.pad_token_id is None
    return 0 if is_impossible else room


def mask_scores(
    scores: NDArray[np.float32], likeliest: NDArray[np.bool_], attention_mask: Any
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Puts 0 and True where a token or the one before it is masked.

    Args:
        scores: (B, T - 1) of the tokens 1 to T - 1.
        likeliest: bool (B, T - 1).
        attention_mask: (B, T): 1 for tokens, 0 for padding; None: nothing is masked.
    """
    if attention_mask is None:
        return scores, likeliest
    mask = np.asarray(attention_mask).astype(bool)
    kept = mask[:, 1:] & mask[:, :-1]
    return np.where(kept, scores, np.float32(0)), likeliest | ~kept
