"""Meshes of devices, as far as no framework is needed: axes, sizes, and what is split over which.

A mesh has three axes: "data" splits the batch, "fsdp" splits the batch and the weights, "model"
splits heads, feed-forward and vocabulary. One table says which logical axis of a parameter goes to
which axis of the mesh; the logical axes come from `opt_core.params`.
"""

import math
import re
from collections.abc import Mapping

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec

AXES: tuple[str, str, str] = ("data", "fsdp", "model")
"""The mesh's axes, outermost first: neighbouring devices share a "model" group."""

RULES: dict[str, str | None] = {
    "vocab": "model",
    "heads": "model",
    "ffn": "model",
    "hidden": "fsdp",
    "embed": "fsdp",
    "position": None,
    "labels": None,
    "rank": None,
}
"""Logical axis of a parameter -> the mesh axis that splits it."""


def check_sizes(data: int, fsdp: int, model: int) -> dict[str, int]:
    """The sizes of a mesh by the names of its axes.

    Raises:
        ConfigError: One is no integer of at least 1.
    """
    sizes = dict(zip(AXES, (data, fsdp, model), strict=True))
    if any(type(size) is not int or size < 1 for size in sizes.values()):
        raise ConfigError(
            f"mesh: expected integers of at least 1, received {describe_sizes(sizes)}"
        )
    return sizes


def check_count(sizes: Mapping[str, int], found: int, is_exact: bool) -> int:
    """The number of devices of a mesh.

    Args:
        sizes: From `check_sizes`.
        found: Devices that there are.
        is_exact: Whether there may be no more of them than the mesh has.

    Raises:
        ConfigError: There are fewer, or more.
    """
    count = math.prod(sizes.values())
    if count > found or (is_exact and count != found):
        raise ConfigError(f"mesh: {describe_sizes(sizes)} needs {count} devices, received {found}")
    return count


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """A mesh in words: "data=2 x fsdp=1 x model=4"."""
    return " x ".join(f"{name}={size}" for name, size in sizes.items())


def parse_mesh(text: str) -> dict[str, int]:
    """The sizes in a text such as "data=2,model=4"; axes that it does not name are 1.

    Raises:
        ConfigError: It is no such text.
    """
    sizes = dict.fromkeys(AXES, 1)
    named: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*([1-9]\d{0,8})\s*", part)
        if match is None or match[1] not in sizes or match[1] in named:
            raise ConfigError(
                f"mesh: expected sizes such as data=2,fsdp=2,model=4, received {text!r}"
            )
        named.append(match[1])
        sizes[match[1]] = int(match[2])
    return sizes


def split_axes(
    spec: ParamSpec, config: OPTConfig, sizes: Mapping[str, int]
) -> tuple[str | None, ...]:
    """The mesh axis that splits each dimension of a parameter; None: it stays whole.

    A dimension that its mesh axis does not divide stays whole, except the vocabulary, whose last
    part may be smaller or padded.

    Args:
        spec: The parameter.
        config: The model's configuration.
        sizes: The mesh's, by axis.
    """
    parts: list[str | None] = []
    for axis, size in zip(spec.axes, spec.shape, strict=True):
        where = RULES[axis]
        # Heads stay whole: half a head on a device would need its other half in every product.
        units = {"heads": config.num_attention_heads, "vocab": 0}.get(axis, size)
        # Once: opt-350m's projections have two dimensions that the same axis would split.
        is_free = where is not None and where not in parts and divides(units, where, sizes)
        parts.append(where if is_free else None)
    return tuple(parts)


def divides(count: int, axis: str, sizes: Mapping[str, int]) -> bool:
    """Whether a mesh axis divides something, and is more than one device."""
    return sizes[axis] > 1 and count % sizes[axis] == 0


def row_axes(rows: int, sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes that split a batch: as many of "data" and "fsdp" as divide it."""
    for axes in (("data", "fsdp"), ("data",), ("fsdp",)):
        if rows % math.prod(sizes[a] for a in axes) == 0:
            return tuple(a for a in axes if sizes[a] > 1)
    return ()


def row_ways(sizes: Mapping[str, int]) -> int:
    """Ways to split a batch: "data" and "fsdp" together."""
    return sizes["data"] * sizes["fsdp"]


def chunk(size: int, ways: int, index: int) -> slice:
    """One of the parts of a dimension: all of them equal, the last ones smaller or empty.

    Args:
        size: Elements.
        ways: Number of parts.
        index: Which of them.
    """
    step = -(-size // ways)
    return slice(min(index * step, size), min((index + 1) * step, size))
