"""A model in training, as `opt_core.training.loop` wants it."""

from contextlib import nullcontext
from os import PathLike
from typing import Any, Self

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.params import ParamSpec
from opt_core.training.config import TrainConfig
from opt_core.training.loop import Slot
from opt_core.training.trainer import BaseTrainer
from opt_tf import _private, lora, sharding, training
from opt_tf.checkpoint import locate


class Trainer(BaseTrainer):
    """A model and its optimizer.

    Args:
        model: The model, trained in place; `make_optimizer` makes it ready.
        config: How to train it.
    """

    training, lora = training, lora
    mesh: Any = None
    """The devices that split its batches (`opt_tf.sharding`), or None."""

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        return int(self.optimizer.iterations.numpy())

    @updates.setter
    def updates(self, count: int) -> None:
        self.optimizer.iterations.assign(count)

    @classmethod
    def model_options(
        cls, config: TrainConfig, from_scratch: bool, device: str | None, mesh: Any
    ) -> dict[str, Any]:
        """The policy of the training's precision."""
        assert device is None
        return {"dtype": "mixed_bfloat16" if config.precision == "bfloat16" else "float32"}

    @classmethod
    def make(
        cls,
        model_class: Any,
        name: str | PathLike[str],
        config: TrainConfig,
        model_config: OPTConfig,
        from_scratch: bool = False,
        device: str | None = None,
        mesh: Any = None,
    ) -> Self:
        """See `BaseTrainer.make`; on a mesh every device gets a copy of the model."""
        sharding.check_mesh(mesh)
        with nullcontext() if mesh is None else mesh.scope():
            made = super().make(model_class, name, config, model_config, from_scratch, device, mesh)
        made.mesh = mesh
        return made

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step (`train_step`)."""
        with nullcontext() if self.mesh is None else self.mesh.scope():
            return super().step(batch, step)

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
