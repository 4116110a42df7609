"""Devices and meshes: which part of every array each device holds.

`opt_core.mesh` says what is split over which axis. A dimension that a mesh axis does not divide
stays whole, except the vocabulary, which is padded.
"""

import atexit
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, make_array_from_callback
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from opt_core import mesh as rules
from opt_core.config import OPTConfig
from opt_core.errors import ConfigError, OPTError
from opt_core.mesh import AXES, RULES
from opt_core.params import ParamSpec
from opt_core.roll_call import RollCall, loss
from opt_core.team import Team
from opt_core.training.microbatches import Batch
from opt_flax import _private

HEARTBEAT = 30
"""Seconds without a word from a process after which JAX ends the others."""
LOST = 2
"""Exit code of a process that lost another one: that of any error it tells of."""


def make_mesh(
    data: int = 1, fsdp: int = 1, model: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh of `data` x `fsdp` x `model` devices.

    Args:
        data: Ways to split the batch.
        fsdp: Ways to split the batch and the weights (fully sharded data parallelism).
        model: Ways to split heads, feed-forward and vocabulary (tensor parallelism).
        devices: The JAX devices; by default the first ones JAX has, of all hosts.

    Raises:
        ConfigError: There are fewer devices, or sizes below 1.
    """
    sizes = rules.check_sizes(data, fsdp, model)
    found = jax.devices() if devices is None else list(devices)
    count = rules.check_count(sizes, len(found), is_exact=devices is not None)
    mesh = jax.make_mesh(
        tuple(sizes.values()), AXES, (AxisType.Auto,) * len(AXES), devices=found[:count]
    )
    check_mesh(mesh)
    return mesh


def check_mesh(mesh: Mesh | None) -> None:
    """Refuses a mesh whose axes are not those of `make_mesh`.

    Raises:
        ConfigError: It is no mesh; an axis is missing, unknown, or not of the type
            `AxisType.Auto`; or this process has none of its devices.
    """
    if mesh is None:
        return
    if not isinstance(mesh, Mesh):
        raise ConfigError(f"mesh: expected a jax.sharding.Mesh, received {type(mesh).__name__}")
    if set(mesh.axis_names) != set(AXES) or set(mesh.axis_types) != {AxisType.Auto}:
        kinds = ", ".join(sorted(str(kind) for kind in set(mesh.axis_types)))
        raise ConfigError(
            f"mesh: expected the axes {', '.join(AXES)} of type Auto (opt_flax.sharding.make_mesh),"
            f" received {', '.join(map(str, mesh.axis_names))} of type {kinds}"
        )
    if jax.process_index() not in {device.process_index for device in mesh.devices.flat}:
        raise ConfigError(
            f"mesh: expected devices of every process, received none of process "
            f"{jax.process_index()} of {jax.process_count()}"
        )


def padded_rows(spec: ParamSpec, mesh: Mesh | None) -> int:
    """Rows of a vocabulary's table so that the mesh divides it: 50272 = 2**5 * 1571 seldom does."""
    ways = 1 if mesh is None else mesh.shape["model"]
    return -(-spec.shape[0] // ways) * ways


def partition(spec: ParamSpec, config: OPTConfig, mesh: Mesh) -> PartitionSpec:
    """How a parameter, in the NNX layout, lies on a mesh."""
    parts = [*rules.split_axes(spec, config, mesh.shape)]
    # As XLA spells it: a program's results then lie as its arguments do, and it is found again.
    while parts and parts[-1] is None:
        parts.pop()
    return PartitionSpec(*parts)


def constrain_rows(values: Array, mesh: Mesh | None, heads: int | None = None) -> Array:
    """Splits an activation over the mesh: its rows, and its heads where it has them.

    Args:
        values: (B, ...).
        mesh: The mesh; None changes nothing.
        heads: The dimension that counts heads.
    """
    if mesh is None:
        return values
    parts: list[Any] = [rows_axes(values.shape[0], mesh)]
    if heads is not None and rules.divides(values.shape[heads], "model", mesh.shape):
        parts += [None] * (heads - 1) + ["model"]
    return lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec(*parts)))


def rows_axes(rows: int, mesh: Mesh) -> tuple[str, ...] | None:
    """The mesh axes that split a batch: as many of "data" and "fsdp" as divide it."""
    return rules.row_axes(rows, mesh.shape) or None


def constrain_table(table: Array, rows: int, axis: str, mesh: Mesh | None) -> Array:
    """An embedding's table, laid out for looking up a batch.

    Where "fsdp" splits the batch it cannot split what is looked up too: the table's rows are made
    whole first, as products do with their weights.

    Args:
        table: (any, any).
        rows: Rows B of the batch.
        axis: Logical axis of the table's rows.
        mesh: The mesh; None changes nothing.
    """
    if mesh is None or "fsdp" not in (rows_axes(rows, mesh) or ()):
        return table
    return lax.with_sharding_constraint(table, NamedSharding(mesh, PartitionSpec(RULES[axis])))


def replicate(values: Array, mesh: Mesh | None) -> Array:
    """Puts the whole of an array on every device, so that every host can read it."""
    if mesh is None:
        return values
    return lax.with_sharding_constraint(values, NamedSharding(mesh, PartitionSpec()))


def shard_batch(values: Any, mesh: Mesh | None) -> Any:
    """Gives each device its rows of a batch (B, ...) that every host has; a spread one stays."""
    if mesh is None or (isinstance(values, Array) and not values.is_fully_addressable):
        return values
    sharding = NamedSharding(mesh, PartitionSpec(rows_axes(len(values), mesh)))
    return make_array_from_callback(values.shape, sharding, lambda part: values[part])


def spread_rows(batch: Batch, mesh: Mesh | None) -> Batch:
    """A batch over a mesh, of which each process has its own rows alone (`row_parts`).

    Args:
        batch: These rows of arrays (B, ...), by name.
        mesh: The mesh; None changes nothing.
    """
    _, hosts = row_parts(mesh)
    if hosts == 1:
        return batch
    assert mesh is not None
    where = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    return {
        name: jax.make_array_from_process_local_data(where, np.asarray(values))
        for name, values in batch.items()
    }


def row_parts(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of a batch's rows this process has, from 0, and how many there are.

    Processes that share a "model" group have the same rows. Where a process' devices have no rows
    that follow one another, each process has them all.
    """
    if mesh is None:
        return 0, 1
    ways = rules.row_ways(mesh.shape)
    where = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    places = where.addressable_devices_indices_map((ways,)).values()
    own = sorted({(part or (slice(None),))[0].indices(ways)[0] for part in places})
    if own != list(range(own[0], own[0] + len(own))) or own[0] % len(own) or ways % len(own):
        return 0, 1
    return own[0] // len(own), ways // len(own)


class Processes(Team):
    """The processes of `jax.distributed`."""

    def __init__(self) -> None:
        self.index, self.count = jax.process_index(), jax.process_count()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order."""
        if self.count == 1:
            return [value]
        own = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = multihost_utils.process_allgather(np.array(own.size)).ravel()
        room = np.zeros(int(sizes.max()), np.uint8)
        room[: own.size] = own
        found = multihost_utils.process_allgather(room)
        return [pickle.loads(row[:size].tobytes()) for row, size in zip(found, sizes, strict=True)]


def team_of(mesh: Mesh | None) -> Team:
    """The processes that share a model."""
    return Team() if mesh is None else Processes()


def connect(coordinator: str | None, index: int, count: int) -> None:
    """Makes this process one of several, before JAX is used.

    Args:
        coordinator: HOST:PORT of the first process; None: what JAX finds on a pod or under Slurm.
        index: Number of this process.
        count: Number of processes.

    Raises:
        ConfigError: The others do not come.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    given = {} if coordinator is None else {
        "coordinator_address": coordinator, "num_processes": count, "process_id": index
    }  # fmt: skip
    try:
        jax.distributed.initialize(**given, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"coordinator: the processes did not meet: {reason}") from None


def disconnect() -> None:
    """Ends the work of the processes with one another."""
    if jax.process_count() > 1:
        jax.distributed.shutdown()


@contextmanager
def told_of_losses(team: Team) -> Iterator[None]:
    """Makes one line of what JAX says where another process is gone.

    Args:
        team: All processes.

    Raises:
        TrainingError: One is gone, or does not answer; it names those that are.
    """
    if team.count == 1:
        yield
        return
    with _roll_call(team) as others:
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if isinstance(error, OPTError) or not _is_loss(error):
                raise
            # JAX would wait at its end for who is gone, and then end this process its own way.
            atexit.register(os._exit, LOST)
            raise loss(team.index, team.count, others.missing()) from error


def _is_loss(error: Exception) -> bool:
    text = str(error).lower()
    signs = ("connection", "timed out", "timeout", "gloo", "nccl", "socket", "peer", "unavailable")
    return isinstance(error, jax.errors.JaxRuntimeError) or any(sign in text for sign in signs)


def _roll_call(team: Team) -> RollCall:
    """Asks at the coordinator, which the first process keeps."""
    store = _private.coordinator()

    def put(name: str, value: str) -> None:
        with suppress(jax.errors.JaxRuntimeError):  # it has a value
            store.key_value_set(f"roll call/{name}", value or "yes")

    def get(name: str) -> str | None:
        try:
            return store.key_value_try_get(f"roll call/{name}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" in str(error):
                return None
            raise

    return RollCall(put, get, team.index, team.count)


def place(tree: Any, mesh: Mesh | None) -> Any:
    """Puts what is not on the mesh yet (counters, random keys) on every device of it."""
    if mesh is None:
        return tree
    whole = NamedSharding(mesh, PartitionSpec())

    def put(value: Array) -> Array:
        if value.sharding.device_set == whole.device_set:
            return value
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            data = put(jax.random.key_data(value))
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(value))
        data = np.asarray(value)
        return make_array_from_callback(value.shape, whole, lambda part: data[part])

    return jax.tree.map(put, tree)
