"""Outliers moved out of the activations, into the weights: a copy of a model that quantises better.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438): `x @ w.T` stays what it is when each input is
divided by a factor and its column of the weight multiplied by it. The factor of an input is
`max |x| ** alpha / max |w| ** (1 - alpha)`, so that both sides share the range. The division is
folded into what makes the input: a norm, the value projection, or the first feed-forward weight.

Factors are rounded to powers of two here. Nothing else is rounded then: the new model computes, bit
for bit, what the old one does, in every backend, until it is loaded with `quantize="int8"`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from conversion.calibration import activation_scales
from conversion.convert import enough_memory, write_checkpoint
from conversion.readers import open_any_checkpoint
from conversion.streaming.lazy_tensors import ScaledTensor
from opt_core.checkpoints.atomic import check_is_new
from opt_core.checkpoints.tensors import LazyTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, ConfigError, DataError
from opt_core.hub import resolve

Factors = NDArray[np.float32]


@dataclass(frozen=True)
class Smoothing:
    """The result of `smooth`.

    Attributes:
        path: The new folder.
        files: Name and bytes of each weight file.
        inputs: How many layers' inputs were looked at, and how many could be changed.
        outliers: Largest input of a layer as a multiple of its median input, before and after: the
            worst layer.
        notes: Remarks for the user, one line each.
    """

    path: Path
    files: dict[str, int]
    inputs: tuple[int, int]
    outliers: tuple[float, float]
    notes: tuple[str, ...]


class _SmoothedInput(NamedTuple):
    """An input by name, the tensors whose rows make it, and the weights whose columns take it."""

    name: str
    producers: tuple[str, ...]
    consumers: tuple[str, ...]


def smooth(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    ids_BT: NDArray[Any],
    alpha: float = 0.5,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
    writing: Callable[[int, int], None] | None = None,
    **hub: Any,
) -> Smoothing:
    """Writes a copy of a model, as safetensors, whose activations have fewer outliers.

    No framework is needed, and no more memory than one layer and the text's activations take.

    Args:
        source: As for `convert`.
        destination: A new folder.
        ids_BT: Rows of a text such as the model will see, without padding.
        alpha: How much of the range goes from inputs to weights, 0 to 1.
        max_shard_size: Most bytes of tensors per file.
        progress: Called with the layers measured and in all.
        writing: Called after that with the bytes read to be written and in all.
        **hub: `revision`, `token`, `local_files_only`, as in `opt_core.hub.resolve`.

    Raises:
        CheckpointError: As for `convert`.
        ConfigError: `alpha` or the text does not fit.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"alpha: expected 0..1, received {alpha}")
    new = Path(os.path.abspath(Path(destination).expanduser()))
    check_is_new(new)
    found = open_any_checkpoint(resolve(source, convertible=True, **hub), **hub)
    plan = found.plan()
    check_text(ids_BT, plan.config)
    tensors = {spec.name: tensor for spec, tensor in plan.entries}
    with enough_memory(found):
        scales = activation_scales(plan.config, tensors, ids_BT, progress)
    for name, scale in scales.items():
        if not np.isfinite(scale).all():
            raise CheckpointError(f"{found.checkpoint.folder}: {name}: inputs are NaN or infinite")
    outliers = _worst_outlier(scales.values())
    count = 0
    for smoothed in _smoothed_inputs(plan.config):
        consumers = [tensors[name] for name in smoothed.consumers]
        factors = _factors(scales[smoothed.name], consumers, alpha)
        scales[smoothed.name] = scales[smoothed.name] / factors
        for name in smoothed.producers:
            if name in tensors:  # a model may have no biases
                tensors[name] = ScaledTensor(tensors[name], np.reciprocal(factors))
        for name in smoothed.consumers:
            tensors[name] = ScaledTensor(tensors[name], factors, axis=1)
        count += 1
    entries = [(spec, tensors[spec.name]) for spec, _ in plan.entries]
    files, notes = write_checkpoint(
        found, replace(plan, entries=entries), new, "safetensors", None, max_shard_size, writing
    )
    left = _worst_outlier(scales.values())
    return Smoothing(new, files, (len(scales), count), (outliers, left), notes)


def calibration_rows(ids: Sequence[int], rows: int, length: int) -> NDArray[np.int32]:
    """Rows taken evenly from a text, fewer where it is short of them.

    Args:
        ids: The text.
        rows: Rows wanted.
        length: Tokens of a row.

    Raises:
        DataError: The text is shorter than one row.
    """
    if len(ids) < length:
        raise DataError(f"the text has {len(ids)} tokens, less than one row of {length}")
    count = min(rows, len(ids) // length)
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int32)


def check_text(ids_BT: NDArray[Any], config: OPTConfig) -> None:
    """Checks that rows of a text are some that a model can take.

    Raises:
        ConfigError: They are not.
    """
    rows, longest = np.asarray(ids_BT), config.max_position_embeddings
    if rows.ndim != 2 or not rows.size or not np.issubdtype(rows.dtype, np.integer):
        raise ConfigError(f"text: expected rows of ids, received {rows.dtype} {list(rows.shape)}")
    if rows.shape[1] > longest:
        raise ConfigError(f"text: expected rows of at most {longest} ids, received {rows.shape[1]}")
    if rows.min() < 0 or rows.max() >= config.vocab_size:
        raise ConfigError(f"text: expected ids in 0..{config.vocab_size - 1}")


def _smoothed_inputs(config: OPTConfig) -> Iterator[_SmoothedInput]:
    for layer in range(config.num_hidden_layers):
        name = f"model.decoder.layers.{layer}"
        attention = f"{name}.self_attn"
        # A norm behind its layer also makes what is added to the next one's output; and not every
        # norm has weights.
        if config.do_layer_norm_before and config.layer_norm_elementwise_affine:
            qkv = tuple(f"{attention}.{x}_proj.weight" for x in "qkv")
            yield _SmoothedInput(f"{attention}.qkv", _affine(f"{attention}_layer_norm"), qkv)
            yield _SmoothedInput(
                f"{name}.fc1", _affine(f"{name}.final_layer_norm"), (f"{name}.fc1.weight",)
            )
        out = f"{attention}.out_proj"
        yield _SmoothedInput(out, _affine(f"{attention}.v_proj"), (f"{out}.weight",))
        if config.activation_function == "relu":  # which scales as its input does
            yield _SmoothedInput(f"{name}.fc2", _affine(f"{name}.fc1"), (f"{name}.fc2.weight",))


def _affine(name: str) -> tuple[str, str]:
    return f"{name}.weight", f"{name}.bias"


def _factors(scales: Factors, consumers: list[LazyTensor], alpha: float) -> Factors:
    """The power of two nearest to each input's factor; 1 where input or weight is always 0."""
    columns = np.stack([np.abs(w.read().astype(np.float32)).max(0) for w in consumers]).max(0)
    used = (scales > 0) & (columns > 0)
    x, w = np.log2(np.where(used, scales, 1)), np.log2(np.where(used, columns, 1))
    powers = np.where(used, alpha * x - (1 - alpha) * w, 0)
    return np.exp2(np.rint(powers - np.median(powers))).astype(np.float32)


def _worst_outlier(scales: Iterable[Factors]) -> float:
    """How far the largest input of a layer is above the median one, in the worst layer."""
    return max((float(s.max() / np.median(s[s > 0])) for s in scales if s.any()), default=1.0)
