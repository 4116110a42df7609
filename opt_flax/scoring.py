"""Scores for evaluation, NumPy in and NumPy out: every backend gives the same.

Rows are filled up on the right to the length of a bucket, so that few programs are compiled; what
lies there is hidden by causality.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax
from numpy.typing import NDArray

from opt_core.evaluation.scoring import LOGITS, bucket_room, mask_scores
from opt_core.generation.request import pad_right
from opt_flax.inputs import check_inputs, check_window
from opt_flax.losses import upcast
from opt_flax.sharding import replicate, shard_batch

if TYPE_CHECKING:
    from opt_flax.heads import FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification
    from opt_flax.modeling import FlaxOPTForCausalLM, FlaxOPTPreTrainedModel


def token_scores(
    model: "FlaxOPTForCausalLM", input_ids: Any, attention_mask: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """How likely each next token was, and whether none was likelier.

    Args:
        model: The language model, in evaluation mode.
        input_ids: (B, T) ids.
        attention_mask: (B, T): 1 for tokens, 0 for padding. Padding on the right needs none: what
            comes later changes nothing, and the scores of padding can be left aside.

    Returns:
        (B, T - 1) log-likelihoods in nats of the tokens 1 to T - 1, and as many booleans. Where
        a token or the one before it is masked: 0, and True.

    Raises:
        InputError: Inputs that do not fit the model.
    """
    graph, state = nnx.split(model)
    ids, mask, length = _inputs(model, input_ids, attention_mask)
    scores, likeliest = (
        np.array(x)[:, : length - 1] for x in _token_scores(graph, state, ids, mask, LOGITS)
    )
    return mask_scores(scores, likeliest, attention_mask)


def token_log_likelihoods(
    model: "FlaxOPTForCausalLM", input_ids: Any, attention_mask: Any = None
) -> NDArray[np.float32]:
    """The first half of `token_scores`: (B, T - 1) log-likelihoods of the next tokens."""
    return token_scores(model, input_ids, attention_mask)[0]


def class_logits(
    model: "FlaxOPTForSequenceClassification", input_ids: Any, attention_mask: Any = None
) -> NDArray[np.float32]:
    """The classifier's scores, (B, num_labels); arguments as in `token_scores`."""
    graph, state = nnx.split(model)
    ids, mask, _ = _inputs(model, input_ids, attention_mask)
    return np.array(_class_logits(graph, state, ids, mask))


def span_logits(
    model: "FlaxOPTForQuestionAnswering", input_ids: Any, attention_mask: Any = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Where an answer starts and where it ends, (B, T) each; arguments as in `token_scores`."""
    graph, state = nnx.split(model)
    ids, mask, length = _inputs(model, input_ids, attention_mask)
    start, end = _span_logits(graph, state, ids, mask)
    return np.array(start)[:, :length], np.array(end)[:, :length]


def _inputs(
    model: "FlaxOPTPreTrainedModel", input_ids: Any, attention_mask: Any
) -> tuple[Array, Array | None, int]:
    """Ids and mask, checked and filled up, and the length they had."""
    config = model.config
    checked = check_inputs(config, model.dtype, input_ids, attention_mask, None, None, None)
    ids, mask = (None if x is None else np.asarray(x) for x in checked[:2])
    assert ids is not None
    T = ids.shape[1]
    check_window(config, checked[1], T)
    width = T + bucket_room(config, T)
    ids = pad_right(ids, width, config.pad_token_id or 0)
    if mask is not None:
        mask = shard_batch(pad_right(mask, width, True), model.mesh)
    return shard_batch(ids, model.mesh), mask, T


@partial(jax.jit, static_argnames=("graph", "limit"))
def _token_scores(
    graph: Any, state: Any, ids_BT: Array, mask_BT: Array | None, limit: int
) -> tuple[Array, Array]:
    model = nnx.merge(graph, state)
    hidden_BTP = model.model(ids_BT, mask_BT, deterministic=True).last_hidden_state[:, :-1]
    B, T, _ = hidden_BTP.shape
    step = min(T, max(1, limit // (B * model.config.vocab_size)))
    room = ((0, 0), (0, -T % step))
    hidden = jnp.pad(hidden_BTP, (*room, (0, 0))).reshape(B, -1, step, hidden_BTP.shape[2])
    targets = jnp.pad(ids_BT[:, 1:], room).reshape(B, -1, step)
    parts = (jnp.moveaxis(hidden, 1, 0), jnp.moveaxis(targets, 1, 0))
    scored = lax.map(lambda part: _scored(model, *part), parts)
    scores, likeliest = (jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, :T] for x in scored)
    return replicate(scores, model.mesh), replicate(likeliest, model.mesh)


@partial(jax.jit, static_argnames="graph")
def _class_logits(graph: Any, state: Any, ids_BT: Array, mask_BT: Array | None) -> Array:
    model = nnx.merge(graph, state)
    logits = model(ids_BT, mask_BT, deterministic=True).logits
    return replicate(logits.astype(jnp.float32), model.mesh)


@partial(jax.jit, static_argnames="graph")
def _span_logits(
    graph: Any, state: Any, ids_BT: Array, mask_BT: Array | None
) -> tuple[Array, Array]:
    model = nnx.merge(graph, state)
    out = model(ids_BT, mask_BT, deterministic=True)
    start, end = (x.astype(jnp.float32) for x in (out.start_logits, out.end_logits))
    return replicate(start, model.mesh), replicate(end, model.mesh)


def _scored(
    model: "FlaxOPTForCausalLM", hidden_BTP: Array, targets_BT: Array
) -> tuple[Array, Array]:
    logits = upcast(model.compute_logits(hidden_BTP))
    picked = jnp.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
    scores = picked - jax.nn.logsumexp(logits, -1)
    return scores.astype(jnp.float32), picked == logits.max(-1)
