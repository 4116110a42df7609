"""A model in training, as `opt_core.training.loop` wants it."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.params import ParamSpec
from opt_core.training.config import TrainConfig
from opt_core.training.loop import Slot, identity
from opt_tf import _private, lora
from opt_tf.checkpoint import locate
from opt_tf.training import evaluate, make_optimizer, train_step

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel


class Trainer:
    """A model and its optimizer.

    Args:
        model: The model, trained in place; `make_optimizer` makes it ready.
        config: How to train it.
    """

    def __init__(self, model: "TFOPTPreTrainedModel", config: TrainConfig):
        self.model, self.config = model, config
        self.optimizer: Any = make_optimizer(model, config)
        self.specs = config.trained_specs(model.config, model.head)
        self.identity = identity(model.config, model.head)

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        return int(self.optimizer.iterations.numpy())

    @updates.setter
    def updates(self, count: int) -> None:
        self.optimizer.iterations.assign(count)

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step (`train_step`) with dropout."""
        return train_step(self.model, self.optimizer, batch, self.config, step)

    def evaluate(self, batches: Iterable[Any]) -> float:
        """The mean loss over batches, without dropout."""
        return evaluate(self.model, batches)

    def get(self, slot: Slot, spec: ParamSpec) -> NDArray[Any]:
        """Values of a trained parameter, float32 in the canonical layout."""
        return self._variable(slot, spec).numpy().astype(np.float32)

    def put(self, slot: Slot, spec: ParamSpec, values: NDArray[Any]) -> None:
        """Replaces them."""
        self._variable(slot, spec).assign(tf.constant(values))

    def export(self, folder: Path) -> None:
        """Writes the model as a Hugging Face folder, adapters merged."""
        lora.merge(self.model)
        self.model.save_pretrained(folder)
        lora.unmerge(self.model)

    def export_adapter(self, folder: Path, base: str) -> None:
        """Writes the adapters as PEFT does."""
        lora.save_adapter(self.model, folder, base)

    def _variable(self, slot: Slot, spec: ParamSpec) -> Any:
        variable = locate(self.model, spec)
        if slot == "value":
            return variable
        mean, square = _private.moments(self.optimizer, variable)
        return mean if slot == "mean" else square


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
    model_config = config.model_config(model_config)
    policy = "mixed_bfloat16" if config.precision == "bfloat16" else "float32"
    if from_scratch:
        model = cls(model_config, seed=config.seed, dtype=policy)
    else:
        model = cls.from_pretrained(name, dtype=policy, config=model_config)
    return Trainer(model, config)
