"""Memory per device: the arithmetic of weights, moments, cache and activations over a mesh.

What lies in memory all the time (weights, AdamW's moments, the cache) is exact: it follows from the
parameter list and the one table of `opt_core.mesh`. What comes and goes (gradients, gathered
weights, activations, logits) is what the backends' own steps keep at most, without what a compiler
saves or needs beside it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from opt_core import mesh as rules
from opt_core.checkpoints.tensors import float_dtype
from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec, param_specs

RESERVE = 0.08
"""Share of a device's memory for its library, fragments and buffers of communication."""

GROUP = 8
"""Devices that a fast link joins, in most machines; a "model" group is not planned beyond it."""


@dataclass(frozen=True)
class Work:
    """A model's task, and its size.

    Attributes:
        task: "train", with AdamW and gradient checkpointing, or "generate".
        dtype: Type of weights, and of gradients and moments with them.
        batch_size: Rows of a step, or prompts of a batch.
        sequence_length: Tokens of a row, or slots of the cache.
    """

    task: Literal["train", "generate"]
    dtype: str
    batch_size: int
    sequence_length: int


@dataclass(frozen=True)
class Plan:
    """Bytes that one device needs.

    Attributes:
        mesh: Sizes by axis.
        weights: This device's part of the weights.
        moments: AdamW's two running means of it.
        cache: Keys and values.
        gradients: Those of its part.
        gathered: Weights of two layers, and of what is in no layer, made whole over "fsdp".
        activations: What the way back needs of the way forward.
        logits: Scores of all tokens (training) or of the last ones, in float32.
    """

    mesh: dict[str, int]
    weights: int
    moments: int
    cache: int
    gradients: int
    gathered: int
    activations: int
    logits: int

    @property
    def resident(self) -> int:
        """Bytes that stay: weights, moments and cache."""
        return self.weights + self.moments + self.cache

    @property
    def total(self) -> int:
        """All bytes at the worst moment."""
        return self.resident + self.gradients + self.gathered + self.activations + self.logits

    def fits(self, memory: int) -> bool:
        """Whether a device of so many bytes has room for it."""
        return self.total <= memory * (1 - RESERVE)


def plan(config: OPTConfig, work: Work, mesh: Mapping[str, int]) -> Plan:
    """The memory of one device of a mesh.

    Args:
        config: The model's configuration.
        work: What it is to do.
        mesh: Sizes by axis (`opt_core.mesh.check_sizes`).
    """
    size = float_dtype(work.dtype).itemsize
    specs = param_specs(config)
    weights = size * sum(_share(spec, config, mesh) for spec in specs)
    gathered = 0
    if mesh["fsdp"] > 1:
        whole = {**mesh, "fsdp": 1}
        layer = sum(_share(s, config, whole) for s in specs if ".layers.0." in s.name)
        rest = sum(_share(s, config, whole) for s in specs if ".layers." not in s.name)
        gathered = size * (2 * layer + rest)
    trains = work.task == "train"
    rows = -(-work.batch_size // rules.row_ways(mesh)) if trains else work.batch_size
    tokens = rows * work.sequence_length
    D, heads = config.hidden_size, config.num_attention_heads
    ways = mesh["model"] if rules.divides(heads, "model", mesh) else 1
    cache = 0 if trains else 2 * config.num_hidden_layers * tokens * (D // ways) * size
    activations = tokens * _per_token(config, mesh) * size
    if trains:
        activations += config.num_hidden_layers * tokens * D * size  # the layers' inputs
    # PyTorch gathers them; with their logarithms and gradients there are three.
    logits = 4 * config.vocab_size * (3 * tokens if trains else rows)
    return Plan(
        mesh=dict(mesh),
        weights=weights,
        moments=2 * weights if trains else 0,
        cache=cache,
        gradients=weights if trains else 0,
        gathered=gathered,
        activations=activations,
        logits=logits,
    )


def suggest(config: OPTConfig, work: Work, devices: int, memory: int) -> Plan | None:
    """The mesh that needs the least communication of those that fit; None: none does.

    Fewest ways of "model" first, which talks in every layer, then of "fsdp".

    Args:
        config: The model's configuration.
        work: What it is to do.
        devices: Devices there are; the mesh has them all.
        memory: Bytes of one of them.

    Raises:
        ConfigError: No number of devices.
    """
    if devices < 1:
        raise ConfigError(f"devices: expected an integer of at least 1, received {devices}")
    plans = (plan(config, work, mesh) for mesh in _meshes(config, work, devices))
    return next((found for found in plans if found.fits(memory)), None)


def _meshes(config: OPTConfig, work: Work, devices: int) -> Iterator[dict[str, int]]:
    """Meshes of so many devices that divide the model and the rows, the least talkative first."""
    for model in range(1, devices + 1):
        is_even = config.num_attention_heads % model == 0 and config.ffn_dim % model == 0
        if devices % model or not is_even or (model > GROUP and work.task == "train"):
            continue
        for fsdp in range(1, devices // model + 1):
            data = devices // model // fsdp
            if (devices // model) % fsdp or config.hidden_size % fsdp:
                continue
            if work.task == "train" and work.batch_size % (data * fsdp):
                continue
            if work.task == "generate" and fsdp > 1:
                continue  # every token would gather every weight
            yield rules.check_sizes(data, fsdp, model)


def _share(spec: ParamSpec, config: OPTConfig, mesh: Mapping[str, int]) -> int:
    """Numbers of a parameter that the fullest device holds."""
    parts = rules.split_axes(spec, config, mesh)
    return math.prod(
        size if axis is None else -(-size // mesh[axis])
        for size, axis in zip(spec.shape, parts, strict=True)
    )


def _per_token(config: OPTConfig, mesh: Mapping[str, int]) -> int:
    """Numbers that one layer makes for a token: norms, residuals, heads and feed-forward."""
    D, F, ways = config.hidden_size, config.ffn_dim, mesh["model"]
    return 4 * D + -(-(4 * D + 2 * F) // ways)
