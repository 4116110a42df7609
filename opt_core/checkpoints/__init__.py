"""Checkpoints on disk: found, compared with the configuration, streamed in, and written."""

from typing import TYPE_CHECKING

from opt_core.lazy_names import lazy_names

if TYPE_CHECKING:
    from opt_core.checkpoints.load import Checkpoint, open_checkpoint
    from opt_core.checkpoints.plan import LoadPlan, plan_load
    from opt_core.checkpoints.safetensors_format import (
        PendingTensor,
        read_safetensors,
        write_safetensors,
    )
    from opt_core.checkpoints.save import save_checkpoint
    from opt_core.checkpoints.tensors import LazyTensor, StoredTensor
    from opt_core.checkpoints.torch_format import read_torch_file

__all__ = [
    "Checkpoint",
    "LazyTensor",
    "LoadPlan",
    "PendingTensor",
    "StoredTensor",
    "open_checkpoint",
    "plan_load",
    "read_safetensors",
    "read_torch_file",
    "save_checkpoint",
    "write_safetensors",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "load": ["Checkpoint", "open_checkpoint"],
        "plan": ["LoadPlan", "plan_load"],
        "safetensors_format": ["PendingTensor", "read_safetensors", "write_safetensors"],
        "save": ["save_checkpoint"],
        "tensors": ["LazyTensor", "StoredTensor"],
        "torch_format": ["read_torch_file"],
    },
)
