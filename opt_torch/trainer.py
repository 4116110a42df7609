"""A model in training, as `opt_core.training.loop` wants it."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.params import ParamSpec
from opt_core.training.config import TrainConfig
from opt_core.training.loop import Slot, identity
from opt_torch import lora
from opt_torch.checkpoint import check_device, locate
from opt_torch.training import evaluate, make_optimizer, train_step

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel

_STATES = {"mean": "exp_avg", "square": "exp_avg_sq"}


class Trainer:
    """A model and its optimizer.

    Args:
        model: The model, trained in place; `make_optimizer` makes it ready.
        config: How to train it.
    """

    def __init__(self, model: "OPTPreTrainedModel", config: TrainConfig):
        self.model, self.config = model, config
        self.optimizer = make_optimizer(model, config)
        self.specs = config.trained_specs(model.config, model.head)
        self.identity = identity(model.config, model.head)

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        states = list(self.optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    @updates.setter
    def updates(self, count: int) -> None:
        for spec in self.specs:
            self._state(spec)["step"].fill_(count)

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step (`train_step`) with dropout."""
        self.model.train()
        return train_step(self.model, self.optimizer, batch, self.config, step)

    def evaluate(self, batches: Iterable[Any]) -> float:
        """The mean loss over batches, without dropout."""
        return evaluate(self.model, batches)

    def get(self, slot: Slot, spec: ParamSpec) -> NDArray[Any]:
        """Values of a trained parameter, float32 in the canonical layout."""
        return self._tensor(slot, spec).float().cpu().numpy()

    def put(self, slot: Slot, spec: ParamSpec, values: NDArray[Any]) -> None:
        """Replaces them."""
        with torch.no_grad():
            self._tensor(slot, spec).copy_(torch.from_numpy(np.array(values)))

    def export(self, folder: Path) -> None:
        """Writes the model as a Hugging Face folder, adapters merged."""
        lora.merge(self.model)
        self.model.save_pretrained(folder)
        lora.unmerge(self.model)

    def export_adapter(self, folder: Path, base: str) -> None:
        """Writes the adapters as PEFT does."""
        lora.save_adapter(self.model, folder, base)

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


def make_trainer(
    cls: "type[OPTPreTrainedModel]",
    name: str | PathLike[str],
    config: TrainConfig,
    model_config: OPTConfig,
    from_scratch: bool = False,
    device: str | None = None,
) -> Trainer:
    """Loads a model and makes it ready for training.

    Args:
        cls: Class of the model.
        name: Folder, hub id, or "mini".
        config: How to train.
        model_config: The model's configuration; `config` may change its dropout.
        from_scratch: Start from random weights, not from the model's.
        device: Such as "cuda"; None: the CPU.
    """
    model_config = config.model_config(model_config)
    if from_scratch:
        model = cls(model_config, seed=config.seed).to(check_device(device or "cpu"))
    else:
        model = cls.from_pretrained(name, config=model_config, device=device or "cpu")
    return Trainer(model, config)
