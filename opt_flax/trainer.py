"""A model in training, as `opt_core.training.loop` wants it."""

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from opt_core.errors import ConfigError
from opt_core.params import ParamSpec
from opt_core.training.config import TrainConfig
from opt_core.training.loop import Slot
from opt_core.training.trainer import BaseTrainer
from opt_flax import lora, training
from opt_flax.checkpoint import as_array, locate, parameter_path

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTPreTrainedModel

_STATES = {"mean": "mu", "square": "nu"}


class Trainer(BaseTrainer):
    """A model and its optimizer.

    Args:
        model: The model, trained in place; `make_optimizer` makes it ready.
        config: How to train it.

    Raises:
        ConfigError: The model's layers are stacked, or its weights are spread over a mesh:
            `opt_flax.training_checkpoints` has checkpoints for these.
    """

    training, lora = training, lora

    def __init__(self, model: "FlaxOPTPreTrainedModel", config: TrainConfig):
        if model.mesh is not None or model.get_decoder().scan_layers:
            raise ConfigError(
                "a model on a mesh or with scan_layers is trained with train_step and "
                "opt_flax.training_checkpoints.TrainingCheckpoints"
            )
        super().__init__(model, config)

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        return int(self._adam().count[...])

    @updates.setter
    def updates(self, count: int) -> None:
        for variable in (self._adam().count, self.optimizer.step):
            variable.set_value(jnp.asarray(count, variable.dtype))

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step (`train_step`) with dropout."""
        self.model.train()
        return super().step(batch, step)

    def get(self, slot: Slot, spec: ParamSpec) -> NDArray[Any]:
        """Values of a trained parameter, float32 in the canonical layout."""
        return as_array(self._variable(slot, spec)[...]).astype(np.float32)

    def put(self, slot: Slot, spec: ParamSpec, values: NDArray[Any]) -> None:
        """Replaces them."""
        variable = self._variable(slot, spec)
        variable.set_value(jnp.array(values, variable.dtype))

    def _adam(self) -> Any:
        """The part of the optimizer's state with the running means: the second transform's."""
        states: Any = self.optimizer.opt_state
        return states[1]

    def _variable(self, slot: Slot, spec: ParamSpec) -> Any:
        if slot == "value":
            return locate(self.model, spec)
        node: Any = getattr(self._adam(), _STATES[slot])
        for part in parameter_path(self.model, spec)[0]:
            node = node[part]
        return node
