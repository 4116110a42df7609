"""Losses as `transformers` defines them, in float32 or better, and the classifier's pooling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_torch.inputs import as_tensor, check_range, is_known

IGNORED = -100
"""Label of a token that has no say in the loss."""


def widen(logits: Tensor) -> Tensor:
    """Logits in at least float32, in which losses are computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def classes(name: str, values: Any, shape: tuple[int, ...], count: int, like: Tensor) -> Tensor:
    """Class numbers as a checked int64 tensor.

    Args:
        name: What they are called, for messages.
        values: Integers below `count`, or -100.
        shape: The shape they must have.
        count: Number of classes.
        like: A tensor on the device they are wanted on.
    """
    labels = as_tensor(name, values, like.device)
    if labels.is_floating_point() or labels.is_complex() or tuple(labels.shape) != shape:
        raise InputError(
            f"{name}: expected integers of shape {shape}, "
            f"received {labels.dtype} of shape {tuple(labels.shape)}"
        )
    labels = labels.long()
    if is_known(labels):
        kept = labels[labels != IGNORED]
        check_range(name, kept, 0, count - 1, f"or {IGNORED} to leave one out")
    return labels


def causal_lm(logits_BTV: Tensor, labels: Any) -> Tensor:
    """Mean cross entropy of each next token, labels of -100 left out.

    Args:
        logits_BTV: The model's logits.
        labels: (B, T) ids, unshifted.
    """
    B, T, V = logits_BTV.shape
    targets = classes("labels", labels, (B, T), V, logits_BTV)[:, 1:].flatten()
    return F.cross_entropy(widen(logits_BTV[:, :-1]).flatten(0, 1), targets, ignore_index=IGNORED)


def classification(logits: Tensor, labels: Any, config: OPTConfig) -> Tensor:
    """Loss of the sequence classifier.

    Args:
        logits: (B, num_labels).
        labels: Class numbers (B,), or floats.
        config: Its `problem_type`; where None: one label is a regression, integer labels are
            classes, float labels are several independent ones.
    """
    logits, labels = widen(logits), as_tensor("labels", labels, logits.device)
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    elif kind is None:
        kind = (
            "multi_label_classification"
            if labels.is_floating_point()
            else "single_label_classification"
        )
    if kind == "single_label_classification":
        B, count = logits.shape
        return F.cross_entropy(logits, classes("labels", labels.reshape(-1), (B,), count, logits))
    if labels.numel() != logits.numel():
        raise InputError(
            f"labels: expected {tuple(logits.shape)} values, received {tuple(labels.shape)}"
        )
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if kind == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def question_answering(
    start_BT: Tensor, end_BT: Tensor, start_positions: Any, end_positions: Any
) -> Tensor:
    """Mean of the cross entropies of start and end; a position beyond the sequence is left out.

    Args:
        start_BT: Start logits.
        end_BT: End logits.
        start_positions: (B,).
        end_positions: (B,).
    """
    B, length = start_BT.shape
    total = torch.zeros((), device=start_BT.device)
    for name, logits, positions in (
        ("start_positions", start_BT, start_positions), ("end_positions", end_BT, end_positions),
    ):  # fmt: skip
        places = as_tensor(name, positions, logits.device)
        if places.is_floating_point() or tuple(places.shape) not in ((B,), (B, 1)):
            raise InputError(
                f"{name}: expected integers of shape ({B},), "
                f"received {places.dtype} of shape {tuple(places.shape)}"
            )
        targets = places.reshape(B).long().clamp(0, length)
        total = total + F.cross_entropy(widen(logits), targets, ignore_index=length)
    return total / 2


def last_token(input_ids: Any, hidden_BTP: Tensor, pad_token_id: int | None) -> Tensor:
    """Where the classifier looks: each row's last id that is not padding, (B,).

    Without ids (embeddings were given) or without a padding id it is the very last place.

    Raises:
        InputError: Several rows and no padding id: where each one ends cannot be known.
    """
    B, T = hidden_BTP.shape[:2]
    if pad_token_id is None and B > 1:
        raise InputError("a batch of several texts needs pad_token_id in the configuration")
    if input_ids is None or pad_token_id is None:
        return torch.full((B,), T - 1, device=hidden_BTP.device)
    is_text = as_tensor("input_ids", input_ids, hidden_BTP.device) != pad_token_id
    return (torch.arange(T, device=hidden_BTP.device) * is_text).argmax(1)
