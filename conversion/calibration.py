"""Inputs of the linear layers of a model on a text, with one layer in memory at a time."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.tensors import LazyTensor
from opt_core.config import OPTConfig
from opt_core.params import POSITION_OFFSET

Array = NDArray[np.float32]
See = Callable[[str, Array], None]
_TOP = "model.decoder"
_EMBEDDING = f"{_TOP}.embed_tokens.weight"
_EPSILON = 1e-5
_HALF = np.float32(0.5)


def activation_scales(
    config: OPTConfig,
    tensors: Mapping[str, LazyTensor],
    ids_BT: NDArray[Any],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Array]:
    """Largest magnitude of every input of the layers' linear weights.

    Args:
        config: The model's configuration.
        tensors: Its weights, under canonical names.
        ids_BT: Rows of a text, without padding.
        progress: Called with the layers done and in all.

    Returns:
        (in,) for each linear layer, by the names of `run_layers`.
    """
    scales: dict[str, Array] = {}

    def see(linear: str, rows: Array) -> None:
        scales[linear] = np.abs(rows).max((0, 1))

    for layer, _ in run_layers(config, tensors, ids_BT, see):
        if progress is not None:
            progress(layer + 1, config.num_hidden_layers)
    return scales


def run_layers(
    config: OPTConfig, tensors: Mapping[str, LazyTensor], ids_BT: NDArray[Any], see: See
) -> Iterator[tuple[int, Array]]:
    """Runs a model in float32 by NumPy, with a layer at a time in memory.

    The exact gelu is replaced by its tanh form: what goes into the layers is all that is looked at.

    Args:
        config: The model's configuration.
        tensors: Its weights, under canonical names; each is read when its turn comes.
        ids_BT: Rows of a text, without padding.
        see: Called with the name of a linear layer, such as "model.decoder.layers.0.fc1", and its
            input (B, T, in), before its weight is read. Query, key and value projections have the
            same input, called "model.decoder.layers.0.self_attn.qkv" here.

    Yields:
        The number of each layer, from 0, and its output (B, T, D).
    """
    embedding, positions = (
        tensors[f"{_TOP}.embed_{name}.weight"].read() for name in ("tokens", "positions")
    )
    hidden = embedding[ids_BT].astype(np.float32)
    if config.has_projections:
        hidden = _linear(hidden, tensors, f"{_TOP}.project_in")
    last = POSITION_OFFSET + ids_BT.shape[1]
    hidden = hidden + positions[POSITION_OFFSET:last].astype(np.float32)
    del embedding, positions
    for layer in range(config.num_hidden_layers):
        hidden = _layer(hidden, tensors, config, f"{_TOP}.layers.{layer}", see)
        yield layer, hidden


def perplexity(config: OPTConfig, tensors: Mapping[str, LazyTensor], ids_BT: NDArray[Any]) -> float:
    """Perplexity of a language model on rows of a text, of all tokens but each row's first.

    Args:
        config: The model's configuration.
        tensors: Its weights, under canonical names.
        ids_BT: Rows of a text, without padding.
    """
    *_, (_, hidden) = run_layers(config, tensors, ids_BT, lambda linear, rows: None)
    if config.has_final_layer_norm:
        hidden = _norm(hidden, tensors, f"{_TOP}.final_layer_norm")
    if config.has_projections:
        hidden = _linear(hidden, tensors, f"{_TOP}.project_out")
    head = _read(tensors, "lm_head.weight" if "lm_head.weight" in tensors else _EMBEDDING)
    losses: list[NDArray[np.float64]] = []
    for states, ids in zip(hidden, ids_BT, strict=True):
        logits = (states[:-1] @ head.T).astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        log_sum = np.log(np.exp(logits).sum(-1))
        losses.append(log_sum - logits[np.arange(len(logits)), ids[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


def _layer(
    hidden: Array, tensors: Mapping[str, LazyTensor], config: OPTConfig, name: str, see: See
) -> Array:
    is_first, attention = config.do_layer_norm_before, f"{name}.self_attn"

    def into(linear: str, rows: Array) -> Array:
        see(linear, rows)
        return rows

    residual = hidden
    if is_first:
        hidden = _norm(hidden, tensors, f"{attention}_layer_norm")
    into(f"{attention}.qkv", hidden)
    query, key, value = (_linear(hidden, tensors, f"{attention}.{x}_proj") for x in "qkv")
    mixed = into(f"{attention}.out_proj", _attend(query, key, value, config.num_attention_heads))
    hidden = residual + _linear(mixed, tensors, f"{attention}.out_proj")
    if not is_first:
        hidden = _norm(hidden, tensors, f"{attention}_layer_norm")
    residual = hidden
    if is_first:
        hidden = _norm(hidden, tensors, f"{name}.final_layer_norm")
    hidden = _linear(into(f"{name}.fc1", hidden), tensors, f"{name}.fc1")
    hidden = into(f"{name}.fc2", _ACTIVATIONS[config.activation_function](hidden))
    hidden = residual + _linear(hidden, tensors, f"{name}.fc2")
    return hidden if is_first else _norm(hidden, tensors, f"{name}.final_layer_norm")


def _attend(query: Array, key: Array, value: Array, heads: int) -> Array:
    """Causal attention, row by row: only one row's scores are in memory."""
    B, T, D = query.shape
    future = np.triu(np.full((T, T), -np.inf, np.float32), 1)
    mixed = np.empty_like(query)
    for row in range(B):
        q, k, v = (x[row].reshape(T, heads, -1).swapaxes(0, 1) for x in (query, key, value))
        scores = (q * np.float32((D // heads) ** -0.5)) @ k.swapaxes(1, 2) + future
        powers = np.exp(scores - scores.max(-1, keepdims=True))
        mixed[row] = (powers / powers.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(T, D)
    return mixed


def _linear(hidden: Array, tensors: Mapping[str, LazyTensor], name: str) -> Array:
    out = hidden @ _read(tensors, f"{name}.weight").T
    return out + _read(tensors, f"{name}.bias") if f"{name}.bias" in tensors else out


def _norm(hidden: Array, tensors: Mapping[str, LazyTensor], name: str) -> Array:
    centred = hidden - hidden.mean(-1, keepdims=True)
    out = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + np.float32(_EPSILON))
    if f"{name}.weight" not in tensors:
        return out
    return out * _read(tensors, f"{name}.weight") + _read(tensors, f"{name}.bias")


def _read(tensors: Mapping[str, LazyTensor], name: str) -> Array:
    return tensors[name].read().astype(np.float32, copy=False)


def _gelu(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return _HALF * (x + x * np.tanh(inner))


def _silu(x: Array) -> Array:
    return _HALF * (x + x * np.tanh(_HALF * x))


_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    **dict.fromkeys(("gelu", "gelu_new", "gelu_pytorch_tanh"), _gelu),
    **dict.fromkeys(("silu", "swish"), _silu),
}
