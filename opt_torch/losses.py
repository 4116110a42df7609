"""Losses as `transformers` defines them, in float32 or better, and the classifier's pooling."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core.config import OPTConfig
from opt_core.inputs import Range
from opt_core.training import labels as rules
from opt_core.training.microbatches import IGNORE_INDEX
from opt_torch.inputs import as_tensor, check_ranges, is_known

CHUNK = 2**24
"""Logits that `chunked_causal_lm` keeps at a time."""


def upcast(logits: Tensor) -> Tensor:
    """Logits in at least float32, in which losses are computed."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def check_labels(name: str, labels: Tensor, shape: tuple[int, ...], count: int) -> Tensor:
    """Class numbers as a checked int64 tensor.

    Args:
        name: What they are called, for messages.
        labels: Integers below `count`, or -100.
        shape: The shape they must have.
        count: Number of classes.
    """
    rules.check_integers(name, labels.dtype, labels.shape, shape)
    labels = labels.long()
    if is_known(labels) and labels.numel():
        # In the place of what is ignored, a value that leaves the least and the most as they are.
        kept = torch.where(labels == IGNORE_INDEX, labels.amax().clamp_min(0), labels)
        check_ranges([Range(name, kept, 0, count - 1, rules.OR_IGNORED)])
    return labels


def causal_lm(
    logits_BTV: Tensor, labels: Any, label_smoothing: float = 0.0, items: Any = None
) -> Tensor:
    """Mean cross entropy of each next token, labels of -100 left out.

    Args:
        logits_BTV: The model's logits.
        labels: (B, T) ids, unshifted.
        label_smoothing: Share of the likelihood that is asked for everywhere.
        items: What the sum is divided by; None: the number of labels, for the mean.
    """
    B, T, V = logits_BTV.shape
    labels = as_tensor("labels", labels, logits_BTV.device)
    targets = check_labels("labels", labels, (B, T), V)[:, 1:].flatten()
    loss = F.cross_entropy(
        upcast(logits_BTV[:, :-1]).flatten(0, 1), targets, ignore_index=IGNORE_INDEX,
        label_smoothing=label_smoothing, reduction="mean" if items is None else "sum",
    )  # fmt: skip
    return loss if items is None else loss / items


def chunked_causal_lm(
    hidden_BTP: Tensor, head_VP: Tensor, labels: Any, label_smoothing: float = 0.0
) -> Tensor:
    """`causal_lm` of hidden states, for training: the logits are never there all at once.

    Each chunk of rows goes to its logits, its loss and its gradients before the next one.

    Args:
        hidden_BTP: The decoder's last hidden states.
        head_VP: Weight of the language-model head.
        labels: (B, T) ids, unshifted, -100 to ignore one.
        label_smoothing: Share of the likelihood that is asked for everywhere.
    """
    (B, T, P), V = hidden_BTP.shape, head_VP.shape[0]
    labels = as_tensor("labels", labels, hidden_BTP.device)
    targets = check_labels("labels", labels, (B, T), V)[:, 1:].flatten()
    rows = hidden_BTP[:, :-1].reshape(-1, P)
    kept = targets != IGNORE_INDEX
    if not kept.all():
        rows, targets = rows[kept], targets[kept]
    loss: Any = _ChunkedCausalLM.apply(rows, head_VP, targets, label_smoothing)
    return loss


class _ChunkedCausalLM(torch.autograd.Function):
    """Mean cross entropy of `rows @ head.T`, and its gradients, computed on the way forward."""

    @staticmethod
    def forward(
        ctx: Any, rows_RP: Tensor, head_VP: Tensor, targets_R: Tensor, smoothing: float
    ) -> Tensor:
        R, V = rows_RP.shape[0], head_VP.shape[0]
        rows, head, kind = rows_RP, head_VP, rows_RP.device.type
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            rows, head = rows.to(dtype), head.to(dtype)
        for_rows, for_head = ctx.needs_input_grad[:2]
        grad_rows = torch.empty_like(rows) if for_rows else None
        grad_head = torch.zeros_like(head) if for_head else None
        total = torch.zeros((), dtype=upcast(rows[:0]).dtype, device=rows.device)
        with torch.autocast(kind, enabled=False):
            size = -(-R // max(1, -(-R * V // CHUNK)))  # equal chunks
            for start in range(0, R, max(1, size)):
                place = slice(start, start + size)
                some, wanted = rows[place], targets_R[place, None]
                logits = upcast(some @ head.T)
                shares = logits.softmax(-1)
                # The largest share is at least 1/V: its logarithm loses nothing.
                norm = logits.amax(-1, keepdim=True) - shares.amax(-1, keepdim=True).log()
                nats = norm - (1 - smoothing) * logits.gather(-1, wanted)
                if smoothing:
                    nats -= smoothing * logits.mean(-1, keepdim=True)
                total += nats.sum()
                if not (for_rows or for_head):
                    continue
                shares.scatter_add_(-1, wanted, torch.full_like(nats, smoothing - 1))
                if smoothing:
                    shares -= smoothing / V
                slope = shares.div_(R).to(some.dtype)
                if grad_rows is not None:
                    torch.mm(slope, head, out=grad_rows[place])
                if grad_head is not None:
                    grad_head.addmm_(slope.T, some)
        ctx.save_for_backward(grad_rows, grad_head)
        ctx.dtypes = rows_RP.dtype, head_VP.dtype
        return total / R

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> Any:
        scaled = [
            None if gradient is None else gradient.to(dtype).mul_(upstream[0])
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None


def classification(
    logits: Tensor, labels: Any, config: OPTConfig, label_smoothing: float = 0.0
) -> Tensor:
    """Loss of the sequence classifier.

    Args:
        logits: (B, num_labels).
        labels: Class numbers (B,), or floats.
        config: Its `problem_type`; where None: one label is a regression, integer labels are
            classes, float labels are several independent ones.
        label_smoothing: Share of the likelihood that is asked of every class.
    """
    logits, labels = upcast(logits), as_tensor("labels", labels, logits.device)
    kind = rules.resolve_problem_type(config, labels.dtype)
    if kind == "single_label_classification":
        B, count = logits.shape
        targets = check_labels("labels", labels.reshape(-1), (B,), count)
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    rules.check_values(labels.shape, logits.shape)
    labels = labels.reshape(logits.shape).to(logits.dtype)
    if kind == "regression":
        return F.mse_loss(logits, labels)
    return F.binary_cross_entropy_with_logits(logits, labels)


def span_position(
    name: str, logits_BT: Tensor, positions: Any, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy of where an answer starts, or ends; a place beyond the sequence is left out.

    Args:
        name: "start_positions" or "end_positions", for messages.
        logits_BT: A score for each place.
        positions: (B,).
        label_smoothing: Share of the likelihood that is asked of every place.
    """
    (B, length), places = logits_BT.shape, as_tensor(name, positions, logits_BT.device)
    rules.check_integers(name, places.dtype, places.shape, (B,), (B, 1))
    targets = places.reshape(B).long().clamp(0, length)
    return F.cross_entropy(
        upcast(logits_BT), targets, ignore_index=length, label_smoothing=label_smoothing
    )


def last_token(input_ids: Any, hidden_BTP: Tensor, pad_token_id: int | None) -> Tensor:
    """Where the classifier looks: each row's last id that is not padding, (B,).

    Without ids (embeddings were given) or without a padding id it is the very last place.

    Raises:
        InputError: Several rows and no padding id: where each one ends cannot be known.
    """
    B, T = hidden_BTP.shape[:2]
    rules.check_padding(pad_token_id, B)
    if input_ids is None or pad_token_id is None:
        return torch.full((B,), T - 1, device=hidden_BTP.device)
    is_text = as_tensor("input_ids", input_ids, hidden_BTP.device) != pad_token_id
    return (torch.arange(T, device=hidden_BTP.device) * is_text).argmax(1)
