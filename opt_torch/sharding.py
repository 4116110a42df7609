"""Processes and meshes: which rows of a batch each process computes.

PyTorch has one process per device, which `torchrun` starts; all of them run the same program.
`opt_core.mesh` says what is split over which axis, `opt_torch.distribution` splits a model.
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from opt_core import mesh as rules
from opt_core.errors import ConfigError
from opt_core.mesh import AXES
from opt_core.training.microbatches import Batch


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1) -> DeviceMesh:
    """A mesh of `data` x `fsdp` x `model` processes, all there are.

    Processes that `torchrun` started find one another here; a program of one process needs nothing.

    Args:
        data: Ways to split the batch.
        fsdp: Ways to split the batch and the weights (fully sharded data parallelism).
        model: Ways to split heads, feed-forward and vocabulary (tensor parallelism).

    Raises:
        ConfigError: There are fewer processes, or more, or sizes below 1.
    """
    sizes = rules.check_sizes(data, fsdp, model)
    rules.check_count(sizes, int(os.environ.get("WORLD_SIZE", "1")), is_exact=True)
    kind = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
    if kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group()
        else:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
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


def own_rows(batch: Batch, mesh: DeviceMesh | None) -> Batch:
    """The rows of a batch that this process computes: all of them where they do not divide.

    Args:
        batch: Arrays (B, ...) by name, the same ones on every process.
        mesh: The mesh; None changes nothing.
    """
    if mesh is None:
        return batch
    rows, place, sizes = len(batch["input_ids"]), place_of(mesh), sizes_of(mesh)
    part = slice(0, rows)
    for axis in rules.row_axes(rows, sizes):
        own = rules.chunk(part.stop - part.start, sizes[axis], place[axis])
        part = slice(part.start + own.start, part.start + own.stop)
    return {name: values[part] for name, values in batch.items()}


def sum_rows(value: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    """The sum of a number over the processes that split a batch."""
    for axis in ("data", "fsdp"):
        if sizes_of(mesh)[axis] > 1:
            dist.all_reduce(value, group=mesh.get_group(axis))
    return value


def agree(value: Any, mesh: DeviceMesh | None) -> Any:
    """The value that the first process has."""
    if mesh is None or mesh.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
