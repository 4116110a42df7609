"""Losses as `transformers` defines them, in float32 or better, and the classifier's pooling."""

from typing import Any

import tensorflow as tf

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.training.microbatches import IGNORE_INDEX
from opt_tf.inputs import as_tensor, check_range, is_known
from opt_tf.linear import sizes


def upcast(logits: tf.Tensor) -> tf.Tensor:
    """Logits in at least float32, in which losses are computed."""
    return logits if logits.dtype == tf.float64 else tf.cast(logits, tf.float32)


def check_labels(name: str, values: Any, shape: tuple[int | None, ...], count: Any) -> tf.Tensor:
    """Class numbers as a checked int32 tensor.

    Args:
        name: What they are called, for messages.
        values: Integers below `count`, or -100.
        shape: The shape they must have, None where any size will do.
        count: Number of classes.
    """
    labels = as_tensor(name, values)
    if not labels.dtype.is_integer or not labels.shape.is_compatible_with(shape):
        raise InputError(
            f"{name}: expected integers of shape {shape}, "
            f"received {labels.dtype.name} of shape {tuple(labels.shape)}"
        )
    if is_known(labels):
        kept = labels[labels != IGNORE_INDEX]
        check_range(name, kept, 0, count - 1, f"or {IGNORE_INDEX} to leave one out")
    return tf.cast(labels, tf.int32)


def causal_lm(logits_BTV: tf.Tensor, labels: Any, label_smoothing: float = 0.0) -> tf.Tensor:
    """Mean cross entropy of each next token, labels of -100 left out.

    Args:
        logits_BTV: The model's logits.
        labels: (B, T) ids, unshifted.
        label_smoothing: Share of the likelihood that is asked for everywhere.
    """
    B, T, V = tuple(logits_BTV.shape)
    targets = check_labels("labels", labels, (B, T), V)
    # The labels are shifted and not the logits: a slice of these would be a copy, and its gradient
    # another one.
    nothing = tf.fill((sizes(targets)[0], 1), IGNORE_INDEX)
    targets = tf.concat([targets[:, 1:], nothing], 1)
    return _cross_entropy(logits_BTV, targets, IGNORE_INDEX, label_smoothing)


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
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    elif kind is None:
        kind = (
            "multi_label_classification"
            if labels.dtype.is_floating
            else "single_label_classification"
        )
    if kind == "single_label_classification":
        B, count = tuple(logits.shape)
        targets = check_labels("labels", tf.reshape(labels, (-1,)), (B,), count)
        return _cross_entropy(logits, targets, IGNORE_INDEX, label_smoothing)
    sizes = labels.shape.num_elements(), logits.shape.num_elements()
    if None not in sizes and sizes[0] != sizes[1]:
        raise InputError(
            f"labels: expected {tuple(logits.shape)} values, received {tuple(labels.shape)}"
        )
    labels = tf.cast(tf.reshape(labels, tf.shape(logits)), logits.dtype)
    if kind == "regression":
        return tf.reduce_mean(tf.math.squared_difference(logits, labels))
    return tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels, logits))


def question_answering(
    start_BT: tf.Tensor,
    end_BT: tf.Tensor,
    start_positions: Any,
    end_positions: Any,
    label_smoothing: float = 0.0,
) -> tf.Tensor:
    """Mean of the cross entropies of start and end; a position beyond the sequence is left out.

    Args:
        start_BT: Start logits.
        end_BT: End logits.
        start_positions: (B,).
        end_positions: (B,).
        label_smoothing: Share of the likelihood that is asked of every place.
    """
    B, length = start_BT.shape[0], sizes(start_BT)[1]
    total = []
    for name, logits, positions in (
        ("start_positions", start_BT, start_positions), ("end_positions", end_BT, end_positions),
    ):  # fmt: skip
        places = as_tensor(name, positions)
        shapes = (B,), (B, 1)
        if not places.dtype.is_integer or not any(map(places.shape.is_compatible_with, shapes)):
            raise InputError(
                f"{name}: expected integers of shape ({B},), "
                f"received {places.dtype.name} of shape {tuple(places.shape)}"
            )
        targets = tf.clip_by_value(tf.cast(tf.reshape(places, (-1,)), tf.int32), 0, length)
        total.append(_cross_entropy(logits, targets, length, label_smoothing))
    return (total[0] + total[1]) / 2


def last_token(input_ids: Any, hidden_BTP: tf.Tensor, pad_token_id: int | None) -> tf.Tensor:
    """Where the classifier looks: each row's last id that is not padding, (B,).

    Without ids (embeddings were given) or without a padding id it is the very last place.

    Raises:
        InputError: Several rows and no padding id: where each one ends cannot be known.
    """
    B, T = sizes(hidden_BTP)[:2]
    if pad_token_id is None and not (isinstance(B, int) and B == 1):
        raise InputError("a batch of several texts needs pad_token_id in the configuration")
    if input_ids is None or pad_token_id is None:
        return tf.fill((B,), T - 1)
    is_text = tf.cast(as_tensor("input_ids", input_ids) != pad_token_id, tf.int32)
    return tf.argmax(tf.range(T) * is_text, 1, output_type=tf.int32)


def _cross_entropy(
    logits: tf.Tensor, targets: tf.Tensor, ignored: int | tf.Tensor, smoothing: float
) -> tf.Tensor:
    kept, logits = targets != ignored, upcast(logits)
    wanted = tf.where(kept, targets, 0)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(wanted, logits)
    if smoothing:  # a share of the likelihood goes from the target to all
        mean = tf.reduce_mean(logits, -1)
        each += smoothing * (tf.gather(logits, wanted, batch_dims=wanted.shape.rank) - mean)
    weights = tf.cast(kept, each.dtype)
    return tf.reduce_sum(each * weights) / tf.reduce_sum(weights)
