"""A model in training, as `opt_core.training.loop` wants it."""

from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.params import ParamSpec
from opt_core.training.config import TrainConfig
from opt_core.training.loop import Slot
from opt_core.training.trainer import BaseTrainer
from opt_tf import _private, lora, training
from opt_tf.checkpoint import locate


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

    @classmethod
    def model_options(
        cls, config: TrainConfig, from_scratch: bool, device: str | None
    ) -> dict[str, Any]:
        """The policy of the training's precision."""
        assert device is None
        return {"dtype": "mixed_bfloat16" if config.precision == "bfloat16" else "float32"}

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
        mean, square = _private.moments(self.optimizer, variable)
        return mean if slot == "mean" else square
