"""Losses as `transformers` defines them, in float32 or better, and the classifier's pooling."""

from typing import Any

import tensorflow as tf

from opt_core.config import OPTConfig
from opt_core.inputs import Range
from opt_core.training import labels as rules
from opt_core.training.microbatches import IGNORE_INDEX
from opt_tf.inputs import as_tensor, check_ranges, is_known
from opt_tf.linear import sizes

CHUNK = 2**24
"""Logits that `chunked_causal_lm` keeps at a time."""


def upcast(logits: tf.Tensor) -> tf.Tensor:
    """Logits in at least float32, in which losses are computed."""
    return logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)


def check_labels(
    name: str, labels: tf.Tensor, shape: tuple[int | None, ...], count: Any
) -> tf.Tensor:
    """Class numbers as a checked int32 tensor.

    Args:
        name: What they are called, for messages.
        labels: Integers below `count`, or -100.
        shape: The shape they must have, None where any size will do.
        count: Number of classes.
    """
    rules.check_integers(name, labels.dtype.name, tuple(labels.shape), shape)
    if is_known(labels):
        kept = labels[labels != IGNORE_INDEX]
        check_ranges([Range(name, kept, 0, count - 1, rules.OR_IGNORED)])
    return tf.cast(labels, tf.int32)


def causal_lm(
    logits_BTV: tf.Tensor, labels: Any, label_smoothing: float = 0.0, items: Any = None
) -> tf.Tensor:
    """Mean cross entropy of each next token, labels of -100 left out.

    Args:
        logits_BTV: The model's logits.
        labels: (B, T) ids, unshifted.
        label_smoothing: Share of the likelihood that is asked for everywhere.
        items: What the sum is divided by; None: the number of labels, for the mean.
    """
    B, T, V = tuple(logits_BTV.shape)
    targets = _shifted(check_labels("labels", as_tensor("labels", labels), (B, T), V))
    return _cross_entropy(logits_BTV, targets, IGNORE_INDEX, label_smoothing, items)


def chunked_causal_lm(
    hidden_BTP: tf.Tensor, head_VP: tf.Tensor, labels: Any, label_smoothing: float = 0.0
) -> tf.Tensor:
    """`causal_lm` of hidden states, for training: the logits are never there all at once.

    Each chunk of rows goes to its logits, its loss and its gradients before the next one.

    Args:
        hidden_BTP: The decoder's last hidden states, whose type products are computed in.
        head_VP: Weight of the language-model head.
        labels: (B, T) ids, unshifted, -100 to ignore one.
        label_smoothing: Share of the likelihood that is asked for everywhere.
    """
    B, T, P = tuple(hidden_BTP.shape)
    labels = check_labels("labels", as_tensor("labels", labels), (B, T), head_VP.shape[0])
    targets_R = tf.reshape(_shifted(labels), (-1,))

    @tf.custom_gradient
    def compute(rows_RP: tf.Tensor, head_VP: tf.Tensor) -> Any:
        loss, *gradients = _by_chunks(rows_RP, head_VP, targets_R, label_smoothing)

        def backward(upstream: tf.Tensor) -> Any:
            return [tf.cast(upstream, gradient.dtype) * gradient for gradient in gradients]

        return loss, backward

    return compute(tf.reshape(hidden_BTP, (-1, P)), head_VP)


def _by_chunks(
    rows_RP: tf.Tensor, head_VP: tf.Tensor, targets_R: tf.Tensor, smoothing: float
) -> tuple[Any, Any, Any]:
    """Mean cross entropy of `rows @ head.T`, and the gradients of rows and head."""
    (R, P), (V, _), dtype = sizes(rows_RP), sizes(head_VP), upcast(rows_RP[:0]).dtype
    count = -(-R // max(1, CHUNK // V))
    free = -R % count
    rows = tf.reshape(tf.pad(rows_RP, [[0, free], [0, 0]]), (count, -1, P))
    targets = tf.pad(targets_R, [[0, free]], constant_values=IGNORE_INDEX)
    targets = tf.reshape(targets, (count, -1, 1))
    number = tf.reduce_sum(tf.cast(targets != IGNORE_INDEX, dtype))
    head = tf.cast(head_VP, rows.dtype)

    def one(i: Any, total: Any, grad_rows: Any, grad_head: Any) -> Any:
        some, wanted = rows[i], targets[i]
        logits = upcast(tf.matmul(some, head, transpose_b=True))
        kept, is_target = wanted != IGNORE_INDEX, tf.range(V) == wanted
        top = tf.reduce_max(logits, -1, keepdims=True)
        shares = tf.exp(logits - top)
        whole = tf.reduce_sum(shares, -1, keepdims=True)
        picked = tf.reduce_sum(tf.where(is_target, logits, 0), -1, keepdims=True)
        nats = top + tf.math.log(whole) - (1 - smoothing) * picked
        if smoothing:
            nats -= smoothing * tf.reduce_mean(logits, -1, keepdims=True)
        total += tf.reduce_sum(tf.where(kept, nats, 0))
        slope = shares / whole - (1 - smoothing) * tf.cast(is_target, dtype) - smoothing / V
        slope = tf.cast(tf.where(kept, slope / number, 0), some.dtype)
        grad_rows = grad_rows.write(i, tf.matmul(slope, head))
        grad_head += tf.cast(tf.matmul(slope, some, transpose_a=True), head_VP.dtype)
        return i + 1, total, grad_rows, grad_head

    grad_rows: Any = tf.TensorArray(rows.dtype, count, element_shape=rows.shape[1:])
    start = 0, tf.zeros((), dtype), grad_rows, tf.zeros_like(head_VP)
    found = tf.while_loop(lambda i, *_: i < count, one, start, maximum_iterations=count)
    _, total, grad_rows, grad_head = found
    return total / number, tf.reshape(grad_rows.stack(), (-1, P))[:R], grad_head


def classification(
    logits: tf.Tensor, labels: Any, config: OPTConfig, label_smoothing: float = 0.0
) -> tf.Tensor:
    """Loss of the sequence classifier.

    Args:
        logits: (B, num_labels).
        labels: Class numbers (B,), or floats.
        config: Its `problem_type`; where None: one label is a regression, integer labels are
            classes, float labels are several independent ones.
        label_smoothing: Share of the likelihood that is asked of every class.
    """
    logits, labels = upcast(logits), as_tensor("labels", labels)
    kind = rules.resolve_problem_type(config, labels.dtype.name)
    if kind == "single_label_classification":
        B, count = tuple(logits.shape)
        targets = check_labels("labels", tf.reshape(labels, (-1,)), (B,), count)
        return _cross_entropy(logits, targets, IGNORE_INDEX, label_smoothing)
    rules.check_values(tuple(labels.shape), tuple(logits.shape))
    labels = tf.cast(tf.reshape(labels, tf.shape(logits)), logits.dtype)
    if kind == "regression":
        return tf.reduce_mean(tf.math.squared_difference(logits, labels))
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))


def span_position(
    name: str, logits_BT: tf.Tensor, positions: Any, label_smoothing: float = 0.0
) -> tf.Tensor:
    """Cross entropy of where an answer starts, or ends; a place beyond the sequence is left out.

    Args:
        name: "start_positions" or "end_positions", for messages.
        logits_BT: A score for each place.
        positions: (B,).
        label_smoothing: Share of the likelihood that is asked of every place.
    """
    B, length, places = logits_BT.shape[0], sizes(logits_BT)[1], as_tensor(name, positions)
    rules.check_integers(name, places.dtype.name, tuple(places.shape), (B,), (B, 1))
    targets = tf.clip_by_value(tf.cast(tf.reshape(places, (-1,)), tf.int32), 0, length)
    return _cross_entropy(logits_BT, targets, length, label_smoothing)


def last_token(input_ids: Any, hidden_BTP: tf.Tensor, pad_token_id: int | None) -> tf.Tensor:
    """Where the classifier looks: each row's last id that is not padding, (B,).

    Without ids (embeddings were given) or without a padding id it is the very last place.

    Raises:
        InputError: Several rows and no padding id: where each one ends cannot be known.
    """
    B, T = sizes(hidden_BTP)[:2]
    rules.check_padding(pad_token_id, hidden_BTP.shape[0])
    if input_ids is None or pad_token_id is None:
        return tf.fill((B,), T - 1)
    is_text = tf.cast(as_tensor("input_ids", input_ids) != pad_token_id, tf.int32)
    return tf.argmax(tf.range(T) * is_text, 1, output_type=tf.int32)


def _shifted(labels_BT: tf.Tensor) -> tf.Tensor:
    """The next token of each: a slice of the logits would be a copy, and its gradient another."""
    nothing = tf.fill((sizes(labels_BT)[0], 1), IGNORE_INDEX)
    return tf.concat([labels_BT[:, 1:], nothing], 1)


def _cross_entropy(
    logits: tf.Tensor, targets: tf.Tensor, ignored: int | tf.Tensor, smoothing: float,
    items: Any = None,
) -> tf.Tensor:  # fmt: skip
    kept, logits = targets != ignored, upcast(logits)
    wanted = tf.where(kept, targets, 0)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(wanted, logits)
    if smoothing:  # a share of the likelihood goes from the target to all
        mean = tf.reduce_mean(logits, -1)
        each += smoothing * (tf.gather(logits, wanted, batch_dims=wanted.shape.rank) - mean)
    weights = tf.cast(kept, each.dtype)
    count = tf.reduce_sum(weights) if items is None else tf.cast(items, each.dtype)
    return tf.reduce_sum(each * weights) / count
