"""Processes and meshes: which rows of a batch each process computes.

PyTorch has one process per device, which `torchrun` starts; all of them run the same program.
`opt_core.mesh` says what is split over which axis, `opt_torch.distribution` splits a model.
"""

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from opt_core import mesh as rules
from opt_core.errors import ConfigError, OPTError
from opt_core.mesh import AXES
from opt_core.roll_call import RollCall, loss
from opt_core.team import Team
from opt_core.training.microbatches import Batch, count_labels

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

_stores: Any = dist
"""Its stores, which are documented but written in C++: type checkers do not find them."""


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1) -> DeviceMesh:
    """A mesh of `data` x `fsdp` x `model` processes, all there are.

    Processes that `torchrun` started find one another here; a program of one process needs nothing.

    Args:
        data: Ways to split the batch.
        fsdp: Ways to split the batch and the weights (fully sharded data parallelism).
        model: Ways to split heads, feed-forward and vocabulary (tensor parallelism).

    Raises:
        ConfigError: There are fewer processes, or more, or sizes below 1.
        TrainingError: Other processes ask for another mesh.
    """
    sizes = rules.check_sizes(data, fsdp, model)
    rules.check_count(sizes, int(os.environ.get("WORLD_SIZE", "1")), is_exact=True)
    kind = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    if kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if "RANK" in os.environ:
            # torchrun keeps the store when it restarts: nobody may find those who are gone.
            store, rank, count = next(iter(rendezvous("env://")))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            Processes.meetings += 1  # nor may a second group find the first one's words
            store = _stores.PrefixStore(f"opt-lm/{attempt}/{Processes.meetings}", store)
            Processes.store = store
            dist.init_process_group(store=store, rank=rank, world_size=count)
        else:
            dist.init_process_group(store=_stores.HashStore(), rank=0, world_size=1)
    Processes().check_same("mesh", rules.describe_sizes(sizes))  # or they wait for one another
    return init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=AXES)


def check_mesh(mesh: DeviceMesh | None) -> None:
    """Refuses a mesh whose axes are not those of `make_mesh`.

    Raises:
        ConfigError: It is no mesh, or an axis is missing or unknown.
    """
    if mesh is None:
        return
    if not isinstance(mesh, DeviceMesh):
        name = type(mesh).__name__
        raise ConfigError(f"mesh: expected a torch.distributed DeviceMesh, received {name}")
    if mesh.mesh_dim_names != AXES:
        names = ", ".join(mesh.mesh_dim_names or ("none",))
        raise ConfigError(
            f"mesh: expected the axes {', '.join(AXES)} (opt_torch.sharding.make_mesh), "
            f"received {names}"
        )


def is_spread(values: Any) -> "TypeGuard[DTensor]":
    """Whether a tensor lies on a mesh, found out without a second's import where nothing does."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(values, module.DTensor)


def sizes_of(mesh: DeviceMesh) -> dict[str, int]:
    """The sizes of a mesh by axis."""
    return dict(zip(AXES, mesh.shape, strict=True))


def place_of(mesh: DeviceMesh) -> dict[str, int]:
    """The place of this process on a mesh, by axis."""
    return {axis: mesh.get_local_rank(axis) for axis in AXES}


def mesh_device(mesh: DeviceMesh) -> torch.device:
    """The device that this process computes on."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.accelerator.current_device_index())


@dataclass(frozen=True)
class OwnRows:
    """The rows of a batch that one process computes.

    Attributes:
        batch: These rows, by name.
        ways: Number of parts the batch is cut into.
        index: Which of them this is.
        total: Predictions of the whole batch.
    """

    batch: Batch
    ways: int
    index: int
    total: int


def own_rows(batch: Batch, mesh: DeviceMesh, is_language_model: bool) -> OwnRows:
    """The rows of a batch that this process computes: all of them where they do not divide.

    Args:
        batch: Arrays (B, ...) by name, the same ones on every process, or of `spread_rows`.
        mesh: The mesh.
        is_language_model: As in `count_labels`.
    """
    sizes, place, ids = sizes_of(mesh), place_of(mesh), batch["input_ids"]
    if is_spread(ids):
        own = {name: values.to_local() for name, values in batch.items()}
        count = torch.tensor(count_labels(own, is_language_model), device=ids.device)
        axes, total = ("data", "fsdp"), int(sum_rows(count, mesh))
    else:
        own, axes = batch, rules.row_axes(len(ids), sizes)
        total = count_labels(batch, is_language_model)
    index, ways = 0, math.prod(sizes[axis] for axis in axes)
    for axis in axes:
        index = index * sizes[axis] + place[axis]
    if own is batch:
        part = rules.chunk(len(ids), ways, index)
        own = {name: values[part] for name, values in batch.items()}
    return OwnRows(own, ways, index, total)


def spread_rows(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """A batch of which every process has its own rows alone.

    Args:
        batch: These rows of arrays (B, ...), by name.
        mesh: The mesh; None changes nothing.
    """
    if mesh is None:
        return batch
    from torch.distributed.tensor import DTensor, Shard

    device, where = mesh_device(mesh), mesh["data", "fsdp"]
    return {
        name: DTensor.from_local(torch.as_tensor(values, device=device), where, [Shard(0)] * 2)
        for name, values in batch.items()
    }


def row_parts(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which part of a batch's rows this process computes, from 0, and how many there are."""
    if mesh is None:
        return 0, 1
    sizes, place = sizes_of(mesh), place_of(mesh)
    return place["data"] * sizes["fsdp"] + place["fsdp"], rules.row_ways(sizes)


def sum_rows(values: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum over the processes that split a batch, in place."""
    for axis in ("data", "fsdp"):
        if sizes_of(mesh)[axis] > 1:
            dist.all_reduce(values, group=mesh.get_group(axis))
    return values


class Processes(Team):
    """The processes of PyTorch's default group, which a mesh is made of."""

    store: ClassVar[Any] = None
    """Where they met."""
    meetings: ClassVar[int] = 0
    """How often they did so far."""

    def __init__(self) -> None:
        self.index, self.count = dist.get_rank(), dist.get_world_size()

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order."""
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, value)
        return found


def team_of(mesh: DeviceMesh | None) -> Team:
    """The processes that share a model."""
    return Team() if mesh is None else Processes()


def disconnect() -> None:
    """Ends the work of the processes with one another."""
    dist.destroy_process_group()


@contextmanager
def told_of_losses(team: Team) -> Iterator[None]:
    """Makes one line of what PyTorch says where another process is gone.

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
        except (dist.DistError, RuntimeError) as error:
            if isinstance(error, OPTError) or not _is_loss(error):
                raise
            raise loss(team.index, team.count, others.missing()) from error


def _is_loss(error: Exception) -> bool:
    text = str(error).lower()
    signs = ("connection", "timed out", "timeout", "gloo", "nccl", "socket", "peer")
    return isinstance(error, dist.DistError) or any(sign in text for sign in signs)


def _roll_call(team: Team) -> RollCall:
    """Asks at the store that torchrun keeps, or the first process."""
    store: Any = Processes.store.clone()  # with a connection of its own

    def put(name: str, value: str) -> None:
        store.compare_set(f"roll call/{name}", "", value or "yes")

    def get(name: str) -> str | None:
        name = f"roll call/{name}"
        return store.get(name).decode() if store.check([name]) else None

    return RollCall(put, get, team.index, team.count)


def agree(value: Any, mesh: DeviceMesh | None) -> Any:
    """The value that the first process has."""
    return team_of(mesh).gather(value)[0]
