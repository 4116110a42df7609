"""Weights rounded so that layers' outputs change least, on a text: a small copy of a model.

GPTQ (Frantar et al. 2022, arXiv 2210.17323): the inputs of a weight are rounded one after the
other, and what rounding one has changed in the output is made up for by those that are not rounded
yet, as the Hessian of the squared error, `X.T @ X` of the layer's inputs on the text, says. The
layers are gone through in order, each with the inputs that the rounded ones before it give.

The numbers are stored as those of `opt_core.quantization`; those of 3 bits are "int4" that ends at
7. The grids of both are not the min-max ones: of some narrower ones, each group gets the one that
loses least.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversion.calibration import perplexity, run_layers
from conversion.convert import QUANTIZED, enough_memory, write_quantized
from conversion.readers import open_any_checkpoint
from conversion.smoothquant import check_text
from conversion.streaming.lazy_tensors import MemoryTensor
from opt_core.checkpoints.atomic import check_is_new
from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import LoadPlan, plan_load
from opt_core.checkpoints.quantized.tensor import numbers_of
from opt_core.checkpoints.quantized.writing import written_scheme
from opt_core.errors import CheckpointError, ConfigError
from opt_core.hub import resolve
from opt_core.params import ParamSpec
from opt_core.quantization import GROUP, QuantizedTensor, quantize_array

SCHEMES = {3: "int4", 4: "int4", 8: "int8"}
"""Bits -> scheme of `opt_core.quantization` that holds such numbers."""

_DAMPING = 0.01  # of the mean of the Hessian's diagonal, as in the paper
_SHARES = [share / 40 for share in range(39, 27, -1)]  # of the min-max grid: 0.975 to 0.7
_BLOCK = 128  # inputs whose corrections are added to the rest at once

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Rounded:
    """The result of `quantize`.

    Attributes:
        path: The new folder.
        files: Name and bytes of each weight file.
        perplexity: That of the model on the text kept for it, before and after; None without one.
        notes: Remarks for the user, one line each.
    """

    path: Path
    files: dict[str, int]
    perplexity: tuple[float, float] | None
    notes: tuple[str, ...]


def quantize(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    ids_BT: NDArray[Any],
    bits: int = 4,
    held_BT: NDArray[Any] | None = None,
    max_shard_size: int | str = "5GB",
    progress: Callable[[int, int], None] | None = None,
    to: str = "safetensors",
    **hub: Any,
) -> Rounded:
    """Writes a copy of a model with weights of 3, 4 or 8 bits, rounded by GPTQ.

    No framework is needed, and no more memory than one layer, the Hessian of its widest input and
    the text's activations take.

    Args:
        source: As for `convert`.
        destination: A new folder.
        ids_BT: Rows of a text such as the model will see, without padding.
        bits: 4 or 8; or 3, with `to="gptq"`.
        held_BT: Other rows, to measure perplexity on before and after; None: it is not measured.
        max_shard_size: Most bytes of tensors per file.
        progress: Called with the layers rounded and in all.
        to: "safetensors" (compressed-tensors), or "gptq" for GPTQ's own layout.
        **hub: `revision`, `token`, `local_files_only`, as in `opt_core.hub.resolve`.

    Raises:
        CheckpointError: As for `convert`; or the model's activations are not finite.
        ConfigError: The bits or the text do not fit.
    """
    if bits not in SCHEMES:
        raise ConfigError(f"bits: expected 3, 4 or 8, received {bits!r}")
    if to not in QUANTIZED:
        raise ConfigError(f"to: expected {' or '.join(QUANTIZED)}, received {to!r}")
    if bits == 3 and to != "gptq":
        raise ConfigError(f"bits: expected 4 or 8 with to={to!r}, received 3; to='gptq' holds them")
    gptq_bits = bits if to == "gptq" else None
    new = Path(os.path.abspath(Path(destination).expanduser()))
    check_is_new(new)
    found = open_any_checkpoint(resolve(source, convertible=True, **hub), **hub)
    plan = found.plan()
    for rows in (ids_BT, held_BT):
        if rows is not None:
            check_text(rows, plan.config)
    floats = {spec.name: tensor for spec, tensor in plan.entries}
    with enough_memory(found):
        before = None if held_BT is None else perplexity(plan.config, floats, held_BT)
        fetch = _Rounding(plan, ids_BT, bits, gptq_bits, progress)
        files = write_quantized(
            found, plan, new, SCHEMES[bits], None, max_shard_size, fetch, gptq_bits
        )
        measured = None
        if before is not None and held_BT is not None:
            stored = plan_load(open_checkpoint(new), plan.config, found.head).entries
            after = perplexity(plan.config, {s.name: t for s, t in stored}, held_BT)
            measured = before, after
    return Rounded(new, files, measured, found.notes)


class _Rounding:
    """Gives the parameters of a rounded model, layer after layer, each made when it is asked for.

    Args:
        plan: The model's tensors.
        ids_BT: The text.
        bits: Of a number.
        gptq_bits: Of a number in GPTQ's layout, if that is written.
        progress: Called with the layers rounded and in all.
    """

    def __init__(
        self,
        plan: LoadPlan,
        ids_BT: NDArray[Any],
        bits: int,
        gptq_bits: int | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self._stored = {spec.name: tensor for spec, tensor in plan.entries}
        self._tensors = dict(self._stored)
        self._bits, self._gptq_bits, self._count = bits, gptq_bits, plan.config.num_hidden_layers
        self._numbers: dict[str, QuantizedTensor] = {}
        self._layers: Iterator[Any] = run_layers(plan.config, self._tensors, ids_BT, self._see)
        self._progress = progress

    def __call__(self, spec: ParamSpec) -> Any:
        stored = self._stored[spec.name]
        kept = written_scheme(spec, SCHEMES[self._bits], self._gptq_bits)
        if kept is None:
            return stored.read()
        if ".layers." not in spec.name:
            return numbers_of(spec.name, stored, kept)
        while spec.name not in self._numbers:
            for name in self._numbers:  # of the layer before: they are written
                self._tensors[name] = self._stored[name]
            self._numbers.clear()
            layer, _ = next(self._layers)
            if self._progress is not None:
                self._progress(layer + 1, self._count)
        return self._numbers[spec.name]

    def _see(self, linear: str, rows_BTI: Matrix) -> None:
        rows = rows_BTI.reshape(-1, rows_BTI.shape[-1])
        with np.errstate(over="ignore", invalid="ignore"):
            hessian = rows.T @ rows
        if not np.isfinite(hessian).all():
            raise CheckpointError(f"{linear}: inputs are NaN, infinite, or too large")
        factor = _factor(hessian)
        stem, _, last = linear.rpartition(".")
        names = (
            [f"{stem}.{x}_proj.weight" for x in "kvq"] if last == "qkv" else [f"{linear}.weight"]
        )
        for name in names:
            stored = self._stored[name]
            weight = stored.read().astype(np.float32)
            numbers = _round(name, weight, hessian, factor, self._bits)
            self._numbers[name] = numbers
            self._tensors[name] = MemoryTensor(name, numbers.dequantize(), stored.file)


def _factor(hessian: Matrix) -> Matrix:
    """Weights by which the error of each input is made up for by those behind it.

    Returns:
        The upper Cholesky factor (I, I) of the inverse Hessian.
    """
    wide = hessian.astype(np.float64)
    mean, damping = float(wide.diagonal().mean()) or 1.0, _DAMPING
    while True:
        try:
            lower = np.linalg.cholesky(wide + np.eye(len(wide)) * (damping * mean))
            inverse = np.linalg.inv(lower)
            return np.linalg.cholesky(inverse.T @ inverse).T.astype(np.float32)
        except np.linalg.LinAlgError:  # few rows, or inputs that are nearly the same
            damping *= 10


def _grids(name: str, weight: Matrix, importance: Matrix, bits: int) -> QuantizedTensor:
    """The weight's numbers; of less than 8 bits on the grids that lose least.

    A grid that leaves the extremes of its group out has smaller steps for all the others.

    Args:
        name: The weight's name, for messages.
        weight: (O, I).
        importance: What the square of an input's error counts (I,).
        bits: Of a number.
    """
    numbers, last = quantize_array(name, weight, SCHEMES[bits]), 2**bits - 1
    if numbers.zeros is None:
        return numbers
    free = numbers.scales.shape[1] * GROUP - numbers.width
    grouped = np.pad(weight, ((0, 0), (0, free))).reshape(*numbers.scales.shape, GROUP)
    counts = np.pad(importance, (0, free)).reshape(-1, GROUP)
    low, high = grouped.min(-1, initial=0), grouped.max(-1, initial=0)
    scales: Matrix = numbers.scales * np.float32(15 / last)
    zeros: Matrix = np.clip(np.rint(-low / scales), 0, last)
    least = _loss(grouped, scales, zeros, counts, last)
    for share in _SHARES:
        step = np.maximum((high - low) * np.float32(share / last), numbers.scales.min())
        zero = np.clip(np.rint(-low * np.float32(share) / step), 0, last)
        loss = _loss(grouped, step, zero, counts, last)
        better = loss < least
        least = np.where(better, loss, least)
        scales, zeros = np.where(better, step, scales), np.where(better, zero, zeros)
    return replace(numbers, scales=scales, zeros=zeros.astype(np.uint8))


def _loss(grouped: Matrix, scales: Matrix, zeros: Matrix, counts: Matrix, last: int) -> Matrix:
    """Losses of the groups (O, G) whose weights are rounded to nearest, steps 0 to `last`."""
    steps = np.clip(np.rint(grouped / scales[..., None]) + zeros[..., None], 0, last)
    off = (steps - zeros[..., None]) * scales[..., None] - grouped
    loss: Matrix = (off * off * counts).sum(-1)
    return loss


def _round(name: str, weight: Matrix, hessian: Matrix, factor: Matrix, bits: int) -> Any:
    """Rounds a weight (O, I), one input after the other."""
    numbers = _grids(name, weight, hessian.diagonal(), bits)
    outputs, width = weight.shape
    size = width if numbers.zeros is None else GROUP
    groups = [i // size for i in range(width)]
    scales = numbers.scales.reshape(outputs, -1)
    zeros = np.zeros_like(scales) if numbers.zeros is None else numbers.zeros.astype(np.float32)
    low, high = (-127, 127) if numbers.zeros is None else (0, 2**bits - 1)
    steps: NDArray[np.int16] = np.empty(weight.shape, np.int16)
    left = weight.copy()
    for start in range(0, width, _BLOCK):
        stop = min(start + _BLOCK, width)
        errors: Matrix = np.empty((outputs, stop - start), np.float32)
        for i in range(start, stop):
            scale, zero = scales[:, groups[i]], zeros[:, groups[i]]
            step = np.clip(np.rint(left[:, i] / scale) + zero, low, high)
            error = (left[:, i] - (step - zero) * scale) / factor[i, i]
            left[:, i:stop] -= np.outer(error, factor[i, i:stop])
            steps[:, i], errors[:, i - start] = step, error
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return numbers.rounded(steps)
