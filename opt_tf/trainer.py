"""A model in training, as `opt_core.training.loop` wants it."""

from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.params import ParamSpec
from opt_core.training.config import TrainConfig
from opt_core.training.loop import Slot
from opt_core.training.trainer import BaseTrainer, make_model
from opt_tf import lora, training
from opt_tf.checkpoint import locate

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel

_STATES = {"mean": "_momentums", "square": "_velocities"}


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
        return int(self.optimizer.iterations.numpy())

    @updates.setter
    def updates(self, count: int) -> None:
        self.optimizer.iterations.assign(count)

    def get(self, slot: Slot, spec: ParamSpec) -> NDArray[Any]:
        """Values of a trained parameter, float32 in the canonical layout."""
        return self._variable(slot, spec).numpy().astype(np.float32)

    def put(self, slot: Slot, spec: ParamSpec, values: NDArray[Any]) -> None:
        """Replaces them."""
        self._variable(slot, spec).assign(tf.constant(values))

    def _variable(self, slot: Slot, spec: ParamSpec) -> Any:
        variable = locate(self.model, spec)
        if slot == "value":
            return variable
        return getattr(self.optimizer, _STATES[slot])[self.optimizer._get_variable_index(variable)]


def make_trainer(
    cls: "type[TFOPTPreTrainedModel]",
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
        device: None: TensorFlow places its tensors itself.
    """
    assert device is None
    policy = "mixed_bfloat16" if config.precision == "bfloat16" else "float32"
    return Trainer(make_model(cls, name, config, model_config, from_scratch, dtype=policy), config)
