"""Requirements of a loss on its labels, whatever framework they come in."""

import math
from collections.abc import Sequence
from typing import Any

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.params import Head
from opt_core.training.microbatches import IGNORE_INDEX

Shape = Sequence[int | None]
"""A shape; None where a size is known only when a program is run."""

OR_IGNORED = f"or {IGNORE_INDEX} to leave one out"
"""The other value a label may have, for the message about one out of range."""


def class_count(config: OPTConfig, head: Head) -> int:
    """How many classes the labels of a head are of: tokens, or what a classifier tells apart."""
    return config.vocab_size if head == "causal_lm" else config.num_labels


def resolve_problem_type(config: OPTConfig, dtype: Any) -> str:
    """The kind of problem that a sequence classifier is trained for.

    Args:
        config: Its `problem_type`; where None: one label is a regression, integer labels are
            classes, float labels are several independent ones.
        dtype: Type of the labels, in any framework.
    """
    if config.problem_type is not None:
        return config.problem_type
    if config.num_labels == 1:
        return "regression"
    return "multi_label_classification" if "float" in str(dtype) else "single_label_classification"


def check_integers(name: str, dtype: Any, shape: Shape, *expected: Shape) -> None:
    """Refuses labels that are no integers, or of another shape.

    Args:
        name: What they are called, for messages.
        dtype: Their type, in any framework.
        shape: Their shape.
        *expected: The shapes they may have, the first one for messages.

    Raises:
        InputError: They are something else.
    """
    if "int" not in str(dtype) or not any(_fits(shape, other) for other in expected):
        raise InputError(
            f"{name}: expected integers of shape {tuple(expected[0])}, "
            f"received {dtype} of shape {tuple(shape)}"
        )


def check_values(shape: Shape, expected: Shape) -> None:
    """Refuses labels of another number of values than there are logits, where both are known.

    Args:
        shape: Shape of the labels.
        expected: Shape of the logits.

    Raises:
        InputError: They differ.
    """
    if None in shape or None in expected:
        return
    if math.prod(size or 0 for size in shape) != math.prod(size or 0 for size in expected):
        raise InputError(f"labels: expected {tuple(expected)} values, received {tuple(shape)}")


def question_answering(
    losses: Any,
    start_BT: Any,
    end_BT: Any,
    start_positions: Any,
    end_positions: Any,
    label_smoothing: float = 0.0,
) -> Any:
    """Mean of the cross entropies of start and end; a position beyond the sequence is left out.

    Args:
        losses: The backend's module, with `span_position`.
        start_BT: Start logits.
        end_BT: End logits.
        start_positions: (B,).
        end_positions: (B,).
        label_smoothing: Share of the likelihood that is asked of every place.
    """
    start = losses.span_position("start_positions", start_BT, start_positions, label_smoothing)
    end = losses.span_position("end_positions", end_BT, end_positions, label_smoothing)
    return (start + end) / 2


def check_padding(pad_token_id: int | None, rows: int | None) -> None:
    """Refuses several texts where nothing says where each one ends.

    Args:
        pad_token_id: The configuration's.
        rows: How many texts; None if that is not known.

    Raises:
        InputError: There may be several, and there is no padding id.
    """
    if pad_token_id is None and (rows is None or rows > 1):
        raise InputError("a batch of several texts needs pad_token_id in the configuration")


def _fits(shape: Shape, expected: Shape) -> bool:
    return len(shape) == len(expected) and all(
        None in (a, b) or a == b for a, b in zip(shape, expected, strict=True)
    )
