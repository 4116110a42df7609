"""A model in training, as `opt_core.training.loop` wants it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opt_core.errors import CheckpointError, ConfigError
from opt_core.params import ParamSpec
from opt_core.team import Team
from opt_core.training.config import TrainConfig
from opt_core.training.loop import SLOTS, Slot, check_parts
from opt_core.training.microbatches import as_batch
from opt_core.training.trainer import BaseTrainer
from opt_torch import distribution, lora, sharding, training
from opt_torch.checkpoint import check_device, locate

_STATES = {"mean": "exp_avg", "square": "exp_avg_sq"}


class Trainer(BaseTrainer):
    """A model and its optimizer.

    Args:
        model: The model, trained in place; `make_optimizer` makes it ready.
        config: How to train it.
    """

    training, lora = training, lora

    @property
    def team(self) -> Team:
        """The processes that train the model together."""
        return sharding.team_of(self.model.mesh)

    @property
    def row_parts(self) -> tuple[int, int]:
        """Which part of a batch's rows this process computes, from 0, and how many there are."""
        return sharding.row_parts(self.model.mesh)

    @property
    def is_spread(self) -> bool:
        """Whether tensors are spread over devices."""
        return self.model.mesh is not None

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        states = list(self.optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    @updates.setter
    def updates(self, count: int) -> None:
        for spec in self.specs:
            self._state(spec)["step"].fill_(count)

    @classmethod
    def model_options(
        cls, config: TrainConfig, from_scratch: bool, device: str | None, mesh: Any
    ) -> dict[str, Any]:
        """The device, which a model made from scratch is moved to afterwards; or the mesh."""
        if mesh is not None:
            if device is not None:
                raise ConfigError("--device: a mesh has its own devices; leave it out")
            return {"mesh": mesh}
        place = check_device(device or "cpu")
        return {} if from_scratch else {"device": place}

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step (`train_step`) with dropout."""
        self.model.train()
        own = sharding.spread_rows(as_batch(batch), self.model.mesh)
        return super().step(own, step)

    def get(self, slot: Slot, spec: ParamSpec) -> NDArray[Any]:
        """Values of a trained parameter, float32 in the canonical layout."""
        return self._tensor(slot, spec).float().cpu().numpy()

    def put(self, slot: Slot, spec: ParamSpec, values: NDArray[Any]) -> None:
        """Replaces them."""
        own = values[distribution.own_part(spec, self.model)]
        with torch.no_grad():
            distribution.local(self._tensor(slot, spec)).copy_(torch.from_numpy(np.array(own)))

    def save_parts(self, folder: Path) -> None:
        """Writes the tensors of a checkpoint, every process the parts that it has."""
        # Here, because the import takes most of a second and a run on one device needs none of it.
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        with _told("cannot be written"):
            save(self._tensors(), storage_writer=writer)

    def load_parts(self, folder: Path) -> None:
        """Reads them back, on any mesh or none."""
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
        from torch.distributed.checkpoint.state_dict_loader import load

        tensors = self._tensors()
        with _told("cannot be read"):
            reader = HuggingFaceStorageReader(str(folder))
            found: Any = reader.read_metadata().state_dict_metadata
            shapes = {name: tuple(about.size) for name, about in found.items()}
            check_parts(folder, shapes, {name: tuple(x.shape) for name, x in tensors.items()})
            with warnings.catch_warnings():  # that there is one process only, where there is
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(tensors, storage_reader=reader, no_dist=self.model.mesh is None)

    def _tensors(self) -> dict[str, Any]:
        """All that training changes, by the names of a checkpoint."""
        return {f"{slot}/{s.name}": self._tensor(slot, s) for s in self.specs for slot in SLOTS}

    def _tensor(self, slot: Slot, spec: ParamSpec) -> torch.Tensor:
        if slot == "value":
            return locate(self.model, spec).detach()
        return self._state(spec)[_STATES[slot]]

    def _state(self, spec: ParamSpec) -> dict[str, Any]:
        """The optimizer's state of a parameter, as AdamW makes it in its first step."""
        parameter = locate(self.model, spec)
        state = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for name in _STATES.values():
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Makes a failure of PyTorch's Distributed Checkpoint one line."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, OSError, ValueError, KeyError, RuntimeError) as error:
        reasons = [*error.failures.values()] if isinstance(error, CheckpointException) else [error]
        first = reasons[0][0] if isinstance(reasons[0], tuple) else reasons[0]
        line = str(first).strip().partition("\n")[0] or type(first).__name__
        raise CheckpointError(f"parts of a checkpoint {what}: {line}") from error
