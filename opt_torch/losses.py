"""Losses as `transformers` defines them, in float32 or better, and the classifier's pooling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.config import OPTConfig
from opt_core.errors import InputError

IGNORED = -100
"""Label of a token that has no say in the loss."""


def as_tensor(values: Any, device: torch.device) -> Tensor:
    """Labels as a tensor on the model's device."""
    return torch.as_tensor(values, device=device)


def widen(logits: Tensor) -> Tensor:
    """Logits in at least float32, in which losses are computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def causal_lm(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean cross entropy of each next token, labels of -100 left out.

    Args:
        logits_BTV: The model's logits.
        labels_BT: Ids, unshifted.
    """
    if logits_BTV.shape[:2] != labels_BT.shape:
        raise InputError(
            f"labels: expected shape {tuple(logits_BTV.shape[:2])}, "
            f"received {tuple(labels_BT.shape)}"
        )
    targets = labels_BT[:, 1:].reshape(-1).long()
    return F.cross_entropy(widen(logits_BTV[:, :-1]).flatten(0, 1), targets, ignore_index=IGNORED)


def classification(logits: Tensor, labels: Tensor, config: OPTConfig) -> Tensor:
    """Loss of the sequence classifier.

    Args:
        logits: (B, num_labels).
        labels: Class numbers (B,), or floats.
        config: Its `problem_type`; where None: one label is a regression, integer labels are
            classes, float labels are several independent ones.
    """
    logits = widen(logits)
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
        return F.cross_entropy(logits, labels.reshape(-1).long())
    if labels.numel() != logits.numel():
        raise InputError(
            f"labels: expected {tuple(logits.shape)} values, received {tuple(labels.shape)}"
        )
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if kind == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def question_answering(
    start_BT: Tensor, end_BT: Tensor, start_positions: Tensor, end_positions: Tensor
) -> Tensor:
    """Mean of the cross entropies of start and end; a position beyond the sequence is left out.

    Args:
        start_BT: Start logits.
        end_BT: End logits.
        start_positions: (B,).
        end_positions: (B,).
    """
    length = start_BT.shape[1]
    parts = [
        F.cross_entropy(
            widen(logits), positions.reshape(-1).long().clamp(0, length), ignore_index=length
        )
        for logits, positions in ((start_BT, start_positions), (end_BT, end_positions))
    ]
    return (parts[0] + parts[1]) / 2


def last_token(input_ids: Any, hidden_BTP: Tensor, pad_token_id: int | None) -> Tensor:
    """Where the classifier looks: each row's last id that is not padding, (B,).

    Without ids (embeddings were given) or without a padding id it is the very last place.
    """
    B, T = hidden_BTP.shape[:2]
    if input_ids is None or pad_token_id is None:
        return torch.full((B,), T - 1, device=hidden_BTP.device)
    is_text = as_tensor(input_ids, hidden_BTP.device) != pad_token_id
    return (torch.arange(T, device=hidden_BTP.device) * is_text).argmax(1)
