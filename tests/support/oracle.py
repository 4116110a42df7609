"""The independent reference: OPT in float64 NumPy, slow and plain, sharing nothing with a backend.

Written from the published rules alone (the OPT paper, metaseq, and the behaviour of `transformers`
5), so that a mistake in a backend and a mistake here would have to be the same one to go unseen.
Nothing is cached, nothing is fused: a sequence is always computed whole.
"""

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from opt_core.config import OPTConfig
from opt_core.params import POSITION_OFFSET, Head, ParamSpec, param_specs

Array = NDArray[np.float64]
Params = Mapping[str, NDArray[Any]]

EPSILON = 1e-5
IGNORE = -100

_erf = np.vectorize(math.erf, otypes=[np.float64])


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0.0),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "swish": lambda x: x / (1.0 + np.exp(-x)),
}


@dataclass(frozen=True)
class Output:
    """The outputs of a forward pass.

    Attributes:
        last_hidden_state: [B, T, P], after the final norm and `project_out`.
        logits: [B, T, V]; V is 0 where the parameters hold no language-model head.
        hidden_states: The input of each layer [B, T, D], then `last_hidden_state`: N + 1 arrays.
        attentions: The attention weights of each layer: N arrays [B, H, T, T].
    """

    last_hidden_state: Array
    logits: Array
    hidden_states: list[Array]
    attentions: list[Array]


def random_params(
    config: OPTConfig, head: Head = "causal_lm", seed: int = 0
) -> dict[str, NDArray[np.float32]]:
    """Random values for every parameter: no zeros and no ones that a mix-up could hide behind.

    Each tensor depends on its name, its shape and the seed alone, so two heads share one decoder.

    Args:
        config: The model's configuration.
        head: Which head sits on the decoder.
        seed: Another seed, other values.
    """
    return {spec.name: _random(spec, seed) for spec in param_specs(config, head)}


def _random(spec: ParamSpec, seed: int) -> NDArray[np.float32]:
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    noise = rng.standard_normal(spec.shape)
    # Small token rows, large position rows, strong layers: with the usual proportions a tied head
    # makes greedy text repeat its last token, and then every cache looks right. Larger ones would
    # raise float32's own rounding, about 1e-5 here, above the parity that is promised.
    if spec.name.endswith(".bias"):
        values = 0.2 * noise
    elif spec.kind == "norm":
        values = 1.0 + 0.3 * noise
    elif spec.axes[0] == "vocab":
        values = 0.35 * noise
    elif spec.axes[0] == "position":
        values = 1.5 * noise
    else:
        values = 1.3 * noise / math.sqrt(spec.shape[1])
    return values.astype(np.float32)


def forward(
    params: Params,
    config: OPTConfig,
    input_ids: ArrayLike | None = None,
    attention_mask: ArrayLike | None = None,
    position_ids: ArrayLike | None = None,
    inputs_embeds: ArrayLike | None = None,
) -> Output:
    """Runs the decoder and, where there is one, the language-model head.

    Args:
        params: Canonical name -> array, any float type.
        config: The model's configuration.
        input_ids: Token ids [B, T]; or `inputs_embeds`.
        attention_mask: 1 at tokens, 0 at padding, [B, T]; None means no padding.
        position_ids: Positions [B, T], counted from 0; None derives them from the mask.
        inputs_embeds: Token embeddings [B, T, P], before `project_in`.
    """
    weights = {name: np.asarray(value, np.float64) for name, value in params.items()}
    top = "model.decoder"
    embed_tokens_VP = weights[f"{top}.embed_tokens.weight"]
    if inputs_embeds is None:
        x = embed_tokens_VP[np.asarray(input_ids)]
    else:
        x = np.asarray(inputs_embeds, np.float64)
    mask_BT = np.ones(x.shape[:2], int) if attention_mask is None else np.asarray(attention_mask)
    mask_BT = mask_BT.astype(int)
    positions_BT = make_positions(mask_BT) if position_ids is None else np.asarray(position_ids)

    if config.has_projections:
        x = _linear(x, weights, f"{top}.project_in")
    x = x + weights[f"{top}.embed_positions.weight"][positions_BT + POSITION_OFFSET]

    allowed_BTT = mask_BT[:, None, :] * np.tri(x.shape[1], dtype=int) > 0
    hidden_states, attentions = [], []
    for i in range(config.num_hidden_layers):
        hidden_states.append(x)
        x, attention_BHTT = _layer(x, weights, config, f"{top}.layers.{i}", allowed_BTT)
        attentions.append(attention_BHTT)

    if config.do_layer_norm_before and not config._remove_final_layer_norm:
        x = _layer_norm(x, weights, f"{top}.final_layer_norm")
    if config.has_projections:
        x = _linear(x, weights, f"{top}.project_out")
    hidden_states.append(x)

    head_VP = embed_tokens_VP
    if not config.tie_word_embeddings:
        head_VP = weights.get("lm_head.weight", embed_tokens_VP[:0])
    return Output(x, x @ head_VP.T, hidden_states, attentions)


def make_positions(mask_BT: NDArray[Any]) -> NDArray[Any]:
    """Positions from the mask: how many tokens came before; -1 (row 1 of the table) at padding."""
    return np.cumsum(mask_BT, axis=1) * mask_BT - 1


def _layer(
    x: Array, weights: Params, config: OPTConfig, name: str, allowed_BTT: NDArray[np.bool_]
) -> tuple[Array, Array]:
    pre_norm = config.do_layer_norm_before
    residual = x
    if pre_norm:
        x = _layer_norm(x, weights, f"{name}.self_attn_layer_norm")
    x, attention_BHTT = _attend(x, weights, config, f"{name}.self_attn", allowed_BTT)
    x = residual + x
    if not pre_norm:
        x = _layer_norm(x, weights, f"{name}.self_attn_layer_norm")

    residual = x
    if pre_norm:
        x = _layer_norm(x, weights, f"{name}.final_layer_norm")
    x = _linear(x, weights, f"{name}.fc1")
    x = ACTIVATIONS[config.activation_function](x)
    x = residual + _linear(x, weights, f"{name}.fc2")
    if not pre_norm:
        x = _layer_norm(x, weights, f"{name}.final_layer_norm")
    return x, attention_BHTT


def _attend(
    x: Array, weights: Params, config: OPTConfig, name: str, allowed_BTT: NDArray[np.bool_]
) -> tuple[Array, Array]:
    B, T, D = x.shape
    heads = (B, T, config.num_attention_heads, config.head_dim)
    q_BTHK = _linear(x, weights, f"{name}.q_proj").reshape(heads)
    k_BTHK = _linear(x, weights, f"{name}.k_proj").reshape(heads)
    v_BTHK = _linear(x, weights, f"{name}.v_proj").reshape(heads)
    scores_BHTT = np.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / math.sqrt(config.head_dim)

    # A query that may see nothing (padding on the left) gives zero weights instead of 0/0.
    scores_BHTT = np.where(allowed_BTT[:, None], scores_BHTT, -np.inf)
    top = scores_BHTT.max(axis=-1, keepdims=True)
    powers = np.exp(scores_BHTT - np.where(np.isfinite(top), top, 0.0))
    weights_BHTT = powers / np.maximum(powers.sum(axis=-1, keepdims=True), np.finfo(float).tiny)

    mixed_BTD = np.einsum("bhts,bshk->bthk", weights_BHTT, v_BTHK).reshape(B, T, D)
    return _linear(mixed_BTD, weights, f"{name}.out_proj"), weights_BHTT


def _linear(x: Array, weights: Params, name: str) -> Array:
    return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)


def _layer_norm(x: Array, weights: Params, name: str) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + EPSILON)
    return normal * weights.get(f"{name}.weight", 1.0) + weights.get(f"{name}.bias", 0.0)


def log_softmax(logits: Array) -> Array:
    """Log-probabilities over the last axis; -inf stays -inf."""
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def cross_entropy(logits: ArrayLike, labels: ArrayLike, ignore: int = IGNORE) -> float:
    """Mean of -log p(label) over the labels that are not to be ignored; NaN where none is left.

    Args:
        logits: [..., C].
        labels: Class indices [...].
        ignore: The label that does not count.
    """
    labels = np.asarray(labels)
    kept = labels != ignore
    if not kept.any():
        return math.nan
    chosen = log_softmax(np.asarray(logits, np.float64))[kept]
    return float(-np.take_along_axis(chosen, labels[kept][:, None], axis=-1).mean())


def lm_loss(logits: ArrayLike, labels: ArrayLike) -> float:
    """Language-model loss: position t predicts label t + 1; labels of -100 do not count.

    Args:
        logits: [B, T, V].
        labels: Token ids [B, T], usually the input itself.
    """
    return cross_entropy(np.asarray(logits)[:, :-1], np.asarray(labels)[:, 1:])


def sequence_log_probability(
    params: Params, config: OPTConfig, input_ids: ArrayLike, prompt_length: int
) -> float:
    """Sum of log p(token | everything before) over the tokens after the prompt.

    Args:
        params: Canonical name -> array.
        config: The model's configuration.
        input_ids: One sequence [T], prompt included, no padding.
        prompt_length: How many leading tokens are given.
    """
    ids = np.asarray(input_ids)
    log_p = log_softmax(forward(params, config, ids[None]).logits[0])
    return float(sum(log_p[t - 1, ids[t]] for t in range(prompt_length, len(ids))))


def classify(
    params: Params, config: OPTConfig, input_ids: ArrayLike | None = None, **inputs: Any
) -> Array:
    """Sequence-classification logits [B, num_labels], read at the last token that is not padding.

    Padding is known by its id, whatever the mask says; `inputs_embeds` are read at the end.

    Args:
        params: Canonical name -> array, with `score.weight`.
        config: The model's configuration.
        input_ids: Token ids [B, T]; or `inputs_embeds`.
        **inputs: The other arguments of `forward`.
    """
    x = forward(params, config, input_ids, **inputs).last_hidden_state
    scores = _linear(x, params, "score")
    last = np.full(len(x), x.shape[1] - 1)
    if input_ids is not None and config.pad_token_id is not None:
        for row, ids in enumerate(np.asarray(input_ids)):
            real = np.flatnonzero(ids != config.pad_token_id)
            last[row] = real[-1] if len(real) else 0
    return scores[np.arange(len(x)), last]


def classification_loss(logits: ArrayLike, labels: ArrayLike, config: OPTConfig) -> float:
    """Loss of the classification head: squared error, cross entropy, or one binary one per label.

    Args:
        logits: [B, num_labels].
        labels: Floats [B] or [B, num_labels] (regression), class indices [B] (single-label), or
            zeros and ones [B, num_labels] (multi-label).
        config: `problem_type` decides; where it is None, `num_labels` and the labels' type do.
    """
    scores, labels = np.asarray(logits, np.float64), np.asarray(labels)
    problem = config.problem_type
    if problem is None:
        integers = np.issubdtype(labels.dtype, np.integer)
        several = "single_label_classification" if integers else "multi_label_classification"
        problem = "regression" if config.num_labels == 1 else several
    if problem == "regression":
        return float(((scores - labels.reshape(scores.shape)) ** 2).mean())
    if problem == "single_label_classification":
        return cross_entropy(scores, labels.reshape(-1))
    # log(1 + e^x) - x y, the stable form of -y log s(x) - (1 - y) log(1 - s(x)).
    return float((np.logaddexp(0.0, scores) - scores * labels).mean())


def answer_span(
    params: Params, config: OPTConfig, input_ids: ArrayLike | None = None, **inputs: Any
) -> tuple[Array, Array]:
    """Question-answering logits of the answer's start and end: two arrays [B, T].

    Args:
        params: Canonical name -> array, with `qa_outputs.weight` and `.bias`.
        config: The model's configuration.
        input_ids: Token ids [B, T]; or `inputs_embeds`.
        **inputs: The other arguments of `forward`.
    """
    x = forward(params, config, input_ids, **inputs).last_hidden_state
    logits = _linear(x, params, "qa_outputs")
    return logits[..., 0], logits[..., 1]


def answer_span_loss(
    start_logits: ArrayLike, end_logits: ArrayLike, starts: ArrayLike, ends: ArrayLike
) -> float:
    """Mean of the two cross entropies; a position outside the text is ignored.

    Args:
        start_logits: [B, T].
        end_logits: [B, T].
        starts: First token of the answer [B]; T and above mean "not in this text", below 0 is 0.
        ends: Last token of the answer [B], likewise.
    """
    T = np.asarray(start_logits).shape[1]
    losses = [
        cross_entropy(logits, np.clip(np.asarray(positions).reshape(-1), 0, T), ignore=T)
        for logits, positions in ((start_logits, starts), (end_logits, ends))
    ]
    return sum(losses) / 2
