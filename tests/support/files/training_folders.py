"""Folders as trainers leave them: torch's own distributed checkpoints, and DeepSpeed's layout."""

import os
import sys
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.multiprocessing.spawn import spawn

from tests.support.files.metaseq_fixtures import fake, forget

Box = tuple[tuple[int, ...], tuple[int, ...]]


class InParts(torch.Tensor):
    """A tensor that torch saves in parts, as the processes of a run save theirs."""

    boxes: Sequence[Box]

    def __create_write_items__(self, fqn: str, _object: Any) -> list[WriteItem]:
        whole = self.as_subclass(torch.Tensor)
        properties = TensorProperties.create_from_tensor(whole)
        items: list[WriteItem] = []
        for i, (at, shape) in enumerate(self.boxes):
            chunk = ChunkStorageMetadata(torch.Size(at), torch.Size(shape))
            data = TensorWriteData(chunk=chunk, properties=properties, size=whole.size())
            index = MetadataIndex(fqn, torch.Size(at), i)
            items.append(WriteItem(index=index, type=WriteItemType.SHARD, tensor_data=data))
        return items

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        part = self.as_subclass(torch.Tensor)
        for axis, (start, length) in enumerate(zip(*self.boxes[index.index or 0], strict=True)):
            part = part.narrow(axis, start, length)
        return part


def in_parts(array: Any, boxes: Sequence[Box]) -> InParts:
    tensor = torch.from_numpy(array).as_subclass(InParts)
    tensor.boxes = boxes
    return tensor


def by_rows(array: Any, processes: int) -> InParts:
    """As FSDP cuts: equal numbers of rows, the last ones fewer or none."""
    rows = -(-len(array) // processes)
    starts = [i * rows for i in range(processes) if i * rows < len(array)]
    return in_parts(
        array,
        [
            ((at, *[0] * (array.ndim - 1)), (min(rows, len(array) - at), *array.shape[1:]))
            for at in starts
        ],
    )


def by_grid(array: Any) -> InParts:
    """As FSDP on top of tensor parallelism cuts a matrix: two by two, unequal."""
    if array.ndim == 1:
        return by_rows(array, 2)
    rows, columns = (n // 2 + 1 for n in array.shape)
    below, beside = array.shape[0] - rows, array.shape[1] - columns
    return in_parts(
        array,
        [
            ((0, columns), (rows, beside)),
            ((rows, 0), (below, columns)),
            ((0, 0), (rows, columns)),
            ((rows, columns), (below, beside)),
        ],
    )


def save_distributed(folder: Path, state: Mapping[str, Any]) -> Path:
    """Saves with torch itself, in this one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no other process
        save(dict(state), checkpoint_id=str(folder), no_dist=True)
    return folder


def save_deepspeed(folder: Path, weights: Mapping[str, Any], stage: int = 2) -> Path:
    """A folder as DeepSpeed 0.14's engine.save_checkpoint lays it out.

    Made by hand: DeepSpeed itself cannot be installed here, for it compiles against a GPU's tools.
    """
    tag = folder / "global_step20"
    tag.mkdir(parents=True)
    (folder / "latest").write_text(tag.name)
    (folder / "zero_to_fp32.py").write_text("raise SystemExit('never run')\n")
    tensors = {f"module.{name}": torch.from_numpy(array) for name, array in weights.items()}
    shapes = OrderedDict((name, tensor.shape) for name, tensor in tensors.items())
    empty = {name: torch.empty(0) for name in tensors}
    content = {
        "module": OrderedDict(empty if stage == 3 else tensors),
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [shapes],
        "frozen_param_shapes": None,
        "shared_params": {"module.lm_head.weight": "module.model.decoder.embed_tokens.weight"},
        "lr_scheduler": fake("deepspeed.runtime.lr_schedules", "WarmupLR", last_epoch=20),
        "sparse_tensor_module_names": set(),
        "skipped_steps": 0,
        "global_steps": 20,
        "dp_world_size": 2,
        "mp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": stage}, "fp16": {"enabled": True}},
        "ds_version": "0.14.4",
    }
    prefix = "zero_pp_rank_{}_mp_rank_00" if stage == 3 else "mp_rank_00"
    for rank in range(2 if stage == 3 else 1):
        torch.save(content, tag / f"{prefix.format(rank)}_model_states.pt")
    forget()  # or other libraries would take it to be installed
    flat = torch.cat([tensor.float().reshape(-1) for tensor in tensors.values()])
    for rank, part in enumerate(flat.chunk(2)):
        states = {"optimizer_state_dict": {"single_partition_of_fp32_groups": [part.clone()]}}
        torch.save(states, tag / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    return folder


def save_fsdp(rank: int, folder: str, port: int) -> None:
    """One of two processes that save a model which FSDP has spread over them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    import opt_torch
    from tests.support.files.checkpoint_fixtures import PROJECTED

    model = opt_torch.OPTForCausalLM(PROJECTED, seed=3)
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    save({"model": model.state_dict()}, checkpoint_id=folder)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    spawn(save_fsdp, (sys.argv[1], int(sys.argv[2])), nprocs=2)
