"""Scores for evaluation, NumPy in and NumPy out: every backend gives the same.

Rows are filled up on the right to the length of a bucket, so that few programs are compiled; what
lies there is hidden by causality.
"""

from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.evaluation.scoring import LOGITS, bucket_room, mask_scores
from opt_tf.compilation import compiled
from opt_tf.inputs import check_inputs, check_window
from opt_tf.linear import sizes
from opt_tf.losses import upcast

if TYPE_CHECKING:
    from opt_tf.heads import TFOPTForQuestionAnswering, TFOPTForSequenceClassification
    from opt_tf.modeling import TFOPTForCausalLM, TFOPTPreTrainedModel


def token_scores(
    model: "TFOPTForCausalLM", input_ids: Any, attention_mask: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """How likely each next token was, and whether none was likelier.

    Args:
        model: The language model.
        input_ids: (B, T) ids.
        attention_mask: (B, T): 1 for tokens, 0 for padding. Padding on the right needs none: what
            comes later changes nothing, and the scores of padding can be left aside.

    Returns:
        (B, T - 1) log-likelihoods in nats of the tokens 1 to T - 1, and as many booleans. Where
        a token or the one before it is masked: 0, and True.

    Raises:
        InputError: Inputs that do not fit the model.
    """
    ids, mask, length = _inputs(model, input_ids, attention_mask)
    scores, likeliest = (
        x.numpy()[:, : length - 1] for x in compiled(model, _token_scores, LOGITS)(ids, mask)
    )
    return mask_scores(scores, likeliest, attention_mask)


def token_log_likelihoods(
    model: "TFOPTForCausalLM", input_ids: Any, attention_mask: Any = None
) -> NDArray[np.float32]:
    """The first half of `token_scores`: (B, T - 1) log-likelihoods of the next tokens."""
    return token_scores(model, input_ids, attention_mask)[0]


def class_logits(
    model: "TFOPTForSequenceClassification", input_ids: Any, attention_mask: Any = None
) -> NDArray[np.float32]:
    """The classifier's scores, (B, num_labels); arguments as in `token_scores`."""
    ids, mask, _ = _inputs(model, input_ids, attention_mask)
    return compiled(model, _class_logits)(ids, mask).numpy()


def span_logits(
    model: "TFOPTForQuestionAnswering", input_ids: Any, attention_mask: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where an answer starts and where it ends, (B, T) each; arguments as in `token_scores`."""
    ids, mask, length = _inputs(model, input_ids, attention_mask)
    start, end = compiled(model, _span_logits)(ids, mask)
    return start.numpy()[:, :length], end.numpy()[:, :length]


def _inputs(
    model: "TFOPTPreTrainedModel", input_ids: Any, attention_mask: Any
) -> tuple[tf.Tensor, tf.Tensor | None, int]:
    """Ids and mask, checked and filled up, and the length they had."""
    config = model.config
    ids, mask, *_ = check_inputs(
        config, model.compute_dtype, input_ids, attention_mask, None, None, None
    )
    assert ids is not None
    T: int = sizes(ids)[1]
    check_window(config, mask, T)
    room = ((0, 0), (0, bucket_room(config, T)))
    ids = tf.pad(ids, room, constant_values=config.pad_token_id or 0)
    return ids, None if mask is None else tf.pad(mask, room, constant_values=True), T


def _token_scores(
    model: "TFOPTForCausalLM", limit: int, ids_BT: tf.Tensor, mask_BT: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    hidden_BTP: Any = model.model(ids_BT, mask_BT, training=False).last_hidden_state
    hidden_BTP = hidden_BTP[:, :-1]
    B, T, P = hidden_BTP.shape
    step = min(T, max(1, limit // (B * model.config.vocab_size)))
    room = ((0, 0), (0, -T % step))
    hidden = tf.reshape(tf.pad(hidden_BTP, (*room, (0, 0))), (B, -1, step, P))
    targets = tf.reshape(tf.pad(ids_BT[:, 1:], room), (B, -1, step))
    parts = (tf.transpose(hidden, (1, 0, 2, 3)), tf.transpose(targets, (1, 0, 2)))
    kinds = (tf.TensorSpec((B, step), tf.float32), tf.TensorSpec((B, step), tf.bool))
    scored = tf.map_fn(lambda part: _scored(model, *part), parts, fn_output_signature=kinds)
    scores, likeliest = (tf.reshape(tf.transpose(x, (1, 0, 2)), (B, -1))[:, :T] for x in scored)
    return scores, likeliest


def _class_logits(
    model: "TFOPTForSequenceClassification", ids_BT: tf.Tensor, mask_BT: tf.Tensor | None
) -> tf.Tensor:
    logits: Any = model(ids_BT, mask_BT, training=False).logits
    return tf.cast(logits, tf.float32)


def _span_logits(
    model: "TFOPTForQuestionAnswering", ids_BT: tf.Tensor, mask_BT: tf.Tensor | None
) -> tuple[tf.Tensor, tf.Tensor]:
    out: Any = model(ids_BT, mask_BT, training=False)
    return tf.cast(out.start_logits, tf.float32), tf.cast(out.end_logits, tf.float32)


def _scored(
    model: "TFOPTForCausalLM", hidden_BTP: tf.Tensor, targets_BT: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    logits = upcast(model.compute_logits(hidden_BTP))
    picked = tf.gather(logits, targets_BT, axis=-1, batch_dims=2)
    scores = picked - tf.reduce_logsumexp(logits, -1)
    return tf.cast(scores, tf.float32), picked == tf.reduce_max(logits, -1)
