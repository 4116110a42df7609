"""Devices and meshes: which part of every array each device holds.

A mesh has three axes: "data" splits the batch, "fsdp" splits the batch and the weights, "model"
splits heads, feed-forward and vocabulary. One table says which logical axis of a parameter goes to
which axis of the mesh; the axes themselves come from `opt_core.params`. A dimension that a mesh
axis does not divide stays whole, except the vocabulary, which is padded.
"""

import math
from collections.abc import Sequence

import jax
from jax import Array, Device
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opt_core.config import OPTConfig
from opt_core.dialects import NNX
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec

AXES = ("data", "fsdp", "model")
"""The mesh's axes, outermost first: neighbouring devices share a "model" group."""

RULES: dict[str, str | None] = {
    "vocab": "model",
    "heads": "model",
    "ffn": "model",
    "hidden": "fsdp",
    "embed": "fsdp",
    "position": None,
    "labels": None,
}
"""Logical axis of a parameter -> the mesh axis that splits it."""


def make_mesh(
    data: int = 1, fsdp: int = 1, model: int = 1, devices: Sequence[Device] | None = None
) -> Mesh:
    """A mesh of `data` x `fsdp` x `model` devices.

    Args:
        data: Ways to split the batch.
        fsdp: Ways to split the batch and the weights (fully sharded data parallelism).
        model: Ways to split heads, feed-forward and vocabulary (tensor parallelism).
        devices: The devices; by default the first ones JAX has, of all hosts.

    Raises:
        ConfigError: There are fewer devices, or sizes below 1.
    """
    sizes = (data, fsdp, model)
    found = jax.devices() if devices is None else list(devices)
    count = math.prod(sizes)
    wanted = f"data={data} x fsdp={fsdp} x model={model} = {count} devices"
    if min(sizes) < 1:
        raise ConfigError(f"mesh: expected sizes of at least 1, received {wanted}")
    if count > len(found) or (devices is not None and count != len(found)):
        raise ConfigError(f"mesh: {wanted} were asked for, there are {len(found)}")
    return jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 3, devices=found[:count])


def check_mesh(mesh: Mesh | None) -> None:
    """Refuses a mesh whose axes are not those of `make_mesh`.

    Raises:
        ConfigError: An axis is missing, unknown, or not of the type `AxisType.Auto`.
    """
    if mesh is None:
        return
    if set(mesh.axis_names) != set(AXES) or set(mesh.axis_types) != {AxisType.Auto}:
        raise ConfigError(
            f"mesh: expected the axes {', '.join(AXES)} of type Auto (opt_flax.parallel.make_mesh),"
            f" received {', '.join(map(str, mesh.axis_names))} of {set(mesh.axis_types)}"
        )


def padded_rows(spec: ParamSpec, mesh: Mesh | None) -> int:
    """Rows of a vocabulary's table so that the mesh divides it: 50272 = 2**5 * 1571 seldom does."""
    ways = 1 if mesh is None else mesh.shape["model"]
    return -(-spec.shape[0] // ways) * ways


def partition(spec: ParamSpec, config: OPTConfig, mesh: Mesh) -> PartitionSpec:
    """How a parameter, in the NNX layout, lies on a mesh."""
    parts: list[str | None] = []
    for axis, size in zip(NNX.axes(spec), NNX.shape(spec), strict=True):
        where = RULES[axis]
        # Heads stay whole: half a head on a device would need its other half in every product.
        units = {"heads": config.num_attention_heads, "vocab": 0}.get(axis, size)
        parts.append(where if where and units % mesh.shape[where] == 0 else None)
    return PartitionSpec(*parts)


def constrain_rows(values: Array, mesh: Mesh | None, heads: bool = False) -> Array:
    """Splits an activation over the mesh: its rows, and its heads where it has them.

    Args:
        values: (B, ...), or (B, H, ...) with `heads`.
        mesh: The mesh; None changes nothing.
        heads: Whether the second dimension counts heads.
    """
    if mesh is None:
        return values
    axes = rows_axes(values.shape[0], mesh)
    model = "model" if heads and values.shape[1] % mesh.shape["model"] == 0 else None
    sharding = NamedSharding(mesh, PartitionSpec(axes, model) if heads else PartitionSpec(axes))
    return jax.lax.with_sharding_constraint(values, sharding)


def rows_axes(rows: int, mesh: Mesh) -> tuple[str, ...] | None:
    """The mesh axes that split a batch: as many of "data" and "fsdp" as divide it."""
    for axes in (("data", "fsdp"), ("data",), ("fsdp",)):
        if rows % math.prod(mesh.shape[a] for a in axes) == 0:
            return axes
    return None


def replicate(values: Array, mesh: Mesh | None) -> Array:
    """Puts the whole of an array on every device, so that every host can read it."""
    if mesh is None:
        return values
    return jax.lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec()))
