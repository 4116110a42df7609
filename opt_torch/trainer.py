"""A model in training, as `opt_core.training.loop` wants it."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from opt_core.params import ParamSpec
from opt_core.training.config import TrainConfig
from opt_core.training.loop import Slot
from opt_core.training.trainer import BaseTrainer
from opt_torch import lora, training
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
        cls, config: TrainConfig, from_scratch: bool, device: str | None
    ) -> dict[str, Any]:
        """The device, which a model made from scratch is moved to afterwards."""
        place = check_device(device or "cpu")
        return {} if from_scratch else {"device": place}

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step (`train_step`) with dropout."""
        self.model.train()
        return super().step(batch, step)

    def get(self, slot: Slot, spec: ParamSpec) -> NDArray[Any]:
        """Values of a trained parameter, float32 in the canonical layout."""
        return self._tensor(slot, spec).float().cpu().numpy()

    def put(self, slot: Slot, spec: ParamSpec, values: NDArray[Any]) -> None:
        """Replaces them."""
        with torch.no_grad():
            self._tensor(slot, spec).copy_(torch.from_numpy(np.array(values)))

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
