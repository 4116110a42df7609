"""Losses as `transformers` defines them, in float32 or better, and the classifier's pooling."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from opt_core.config import OPTConfig
from opt_core.inputs import Range
from opt_core.training import labels as rules
from opt_core.training.microbatches import IGNORE_INDEX
from opt_flax.inputs import as_tensor, check_ranges, is_known

CHUNK = 2**24
"""Logits that `chunked_causal_lm` keeps at a time."""


def upcast(logits: Array) -> Array:
    """Logits in at least float32, in which losses are computed."""
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def check_labels(name: str, labels: Array, shape: tuple[int, ...], count: int) -> Array:
    """Class numbers as a checked int32 array.

    Args:
        name: What they are called, for messages.
        labels: Integers below `count`, or -100.
        shape: The shape they must have.
        count: Number of classes.
    """
    rules.check_integers(name, labels.dtype, labels.shape, shape)
    if is_known(labels):
        kept = np.asarray(labels)
        kept = kept[kept != IGNORE_INDEX]
        check_ranges([Range(name, kept, 0, count - 1, rules.OR_IGNORED)])
    return labels.astype(jnp.int32)


def causal_lm(
    logits_BTV: Array, labels: Any, label_smoothing: float = 0.0, items: Any = None
) -> Array:
    """Mean cross entropy of each next token, labels of -100 left out.

    Args:
        logits_BTV: The model's logits.
        labels: (B, T) ids, unshifted.
        label_smoothing: Share of the likelihood that is asked for everywhere.
        items: What the sum is divided by; None: the number of labels, for the mean.
    """
    B, T, V = logits_BTV.shape
    targets = _shifted(check_labels("labels", as_tensor("labels", labels), (B, T), V))
    return _cross_entropy(logits_BTV, targets, IGNORE_INDEX, label_smoothing, items)


def chunked_causal_lm(
    hidden_BTP: Array, head_VP: Array, labels: Any, label_smoothing: float = 0.0
) -> Array:
    """`causal_lm` of hidden states, for training: the logits are never there all at once.

    Each chunk of rows goes to its logits, its loss and its gradients before the next one.

    Args:
        hidden_BTP: The decoder's last hidden states.
        head_VP: Weight of the language-model head.
        labels: (B, T) ids, unshifted, -100 to ignore one.
        label_smoothing: Share of the likelihood that is asked for everywhere.
    """
    (B, T, P), V = hidden_BTP.shape, head_VP.shape[0]
    targets = _shifted(check_labels("labels", as_tensor("labels", labels), (B, T), V))
    return _chunked_causal_lm(
        hidden_BTP.reshape(B * T, P), head_VP, targets.reshape(-1), label_smoothing
    )


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chunked_causal_lm(rows_RP: Array, head_VP: Array, targets_R: Array, smoothing: float) -> Array:
    """Mean cross entropy of `rows @ head.T`."""
    return _by_chunks(rows_RP, head_VP, targets_R, smoothing, False)[0]


def _chunked_causal_lm_forward(
    rows_RP: Array, head_VP: Array, targets_R: Array, smoothing: float
) -> tuple[Array, tuple[Array, Array]]:
    """The same, and its gradients, computed on the way forward."""
    loss, grad_head, grad_rows = _by_chunks(rows_RP, head_VP, targets_R, smoothing, True)
    return loss, (grad_rows, grad_head)


def _chunked_causal_lm_backward(
    smoothing: float, gradients: tuple[Array, Array], upstream: Array
) -> tuple[Array, Array, None]:
    grad_rows, grad_head = ((upstream * g).astype(g.dtype) for g in gradients)
    return grad_rows, grad_head, None


_chunked_causal_lm.defvjp(_chunked_causal_lm_forward, _chunked_causal_lm_backward)


def _by_chunks(
    rows_RP: Array, head_VP: Array, targets_R: Array, smoothing: float, with_gradients: bool
) -> Any:
    """Mean cross entropy, and where they are wanted the gradients of head and rows."""
    (R, P), V = rows_RP.shape, head_VP.shape[0]
    count = -(-R * V // CHUNK)
    free = -R % count
    rows = jnp.pad(rows_RP, ((0, free), (0, 0))).reshape(count, -1, P)
    targets = jnp.pad(targets_R, (0, free), constant_values=IGNORE_INDEX).reshape(count, -1, 1)
    dtype = upcast(rows_RP[:0]).dtype
    number = (targets != IGNORE_INDEX).sum().astype(dtype)

    def one(found: Any, chunk: Any) -> Any:
        some, wanted = chunk
        logits = upcast(jnp.einsum("rp,vp->rv", some, head_VP))
        kept = wanted != IGNORE_INDEX
        # Compared, not looked up: the gradient is then one pass over the logits, without a scatter.
        is_target = jnp.arange(V) == wanted
        norm = jax.nn.logsumexp(logits, -1, keepdims=True)
        nats = norm - (1 - smoothing) * jnp.where(is_target, logits, 0).sum(-1, keepdims=True)
        if smoothing:
            nats = nats - smoothing * logits.mean(-1, keepdims=True)
        total = found[0] + jnp.where(kept, nats, 0).sum()
        if not with_gradients:
            return (total, found[1]), None
        slope = jnp.exp(logits - norm) - (1 - smoothing) * is_target - smoothing / V
        slope = jnp.where(kept, slope / number, 0).astype(some.dtype)
        grad_head = found[1] + jnp.einsum("rv,rp->vp", slope, some)
        return (total, grad_head), jnp.einsum("rv,vp->rp", slope, head_VP)

    start = jnp.zeros((), dtype), jnp.zeros_like(head_VP)
    (total, grad_head), grad_rows = jax.lax.scan(one, start, (rows, targets))
    return total / number, grad_head, None if grad_rows is None else grad_rows.reshape(-1, P)[:R]


def classification(
    logits: Array, labels: Any, config: OPTConfig, label_smoothing: float = 0.0
) -> Array:
    """Loss of the sequence classifier.

    Args:
        logits: (B, num_labels).
        labels: Class numbers (B,), or floats.
        config: Its `problem_type`; where None: one label is a regression, integer labels are
            classes, float labels are several independent ones.
        label_smoothing: Share of the likelihood that is asked of every class.
    """
    logits, labels = upcast(logits), as_tensor("labels", labels)
    kind = rules.resolve_problem_type(config, labels.dtype)
    if kind == "single_label_classification":
        B, count = logits.shape
        targets = check_labels("labels", labels.reshape(-1), (B,), count)
        return _cross_entropy(logits, targets, IGNORE_INDEX, label_smoothing)
    rules.check_values(labels.shape, logits.shape)
    labels = labels.reshape(logits.shape).astype(logits.dtype)
    if kind == "regression":
        return ((logits - labels) ** 2).mean()
    return optax.sigmoid_binary_cross_entropy(logits, labels).mean()


def span_position(
    name: str, logits_BT: Array, positions: Any, label_smoothing: float = 0.0
) -> Array:
    """Cross entropy of where an answer starts, or ends; a place beyond the sequence is left out.

    Args:
        name: "start_positions" or "end_positions", for messages.
        logits_BT: A score for each place.
        positions: (B,).
        label_smoothing: Share of the likelihood that is asked of every place.
    """
    (B, length), places = logits_BT.shape, as_tensor(name, positions)
    rules.check_integers(name, places.dtype, places.shape, (B,), (B, 1))
    targets = places.reshape(B).astype(jnp.int32).clip(0, length)
    return _cross_entropy(logits_BT, targets, length, label_smoothing)


def last_token(input_ids: Any, hidden_BTP: Array, pad_token_id: int | None) -> Array:
    """Where the classifier looks: each row's last id that is not padding, (B,).

    Without ids (embeddings were given) or without a padding id it is the very last place.

    Raises:
        InputError: Several rows and no padding id: where each one ends cannot be known.
    """
    B, T = hidden_BTP.shape[:2]
    rules.check_padding(pad_token_id, B)
    if input_ids is None or pad_token_id is None:
        return jnp.full((B,), T - 1)
    is_text = as_tensor("input_ids", input_ids) != pad_token_id
    return (jnp.arange(T) * is_text).argmax(1)


def _shifted(labels_BT: Array) -> Array:
    """The next token of each: the logits are large, and a slice of them would be a copy."""
    return jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)


def _cross_entropy(
    logits: Array, targets: Array, ignored: int, smoothing: float = 0.0, items: Any = None
) -> Array:
    """Mean negative log-likelihood of the targets, those that equal `ignored` left out."""
    logits, kept = upcast(logits), targets != ignored
    # Compared, not looked up: the gradient is then one pass over the logits, without a scatter.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    picked = jnp.where(is_target, logits, 0).sum(-1)
    nats = jax.nn.logsumexp(logits, -1) - (1 - smoothing) * picked
    if smoothing:
        nats = nats - smoothing * logits.mean(-1)
    return jnp.where(kept, nats, 0).sum() / (kept.sum() if items is None else items)
