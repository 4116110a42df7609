"""A model in training, as `opt_core.training.loop` wants it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray
from orbax.checkpoint import StandardCheckpointer

from opt_core.errors import CheckpointError, ConfigError
from opt_core.params import ParamSpec
from opt_core.team import Team
from opt_core.training.config import TrainConfig
from opt_core.training.loop import SLOTS, Slot, check_parts
from opt_core.training.microbatches import as_batch
from opt_core.training.trainer import BaseTrainer
from opt_flax import lora, sharding, training
from opt_flax.checkpoint import as_array, locate, parameter_path, spread_values

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTPreTrainedModel

_STATES = {"mean": "mu", "square": "nu"}


class Trainer(BaseTrainer):
    """A model and its optimizer.

    Args:
        model: The model, trained in place; `make_optimizer` makes it ready.
        config: How to train it.

    Raises:
        ConfigError: The model's layers are stacked: `opt_flax.training_checkpoints` has checkpoints
            for these.
    """

    training, lora = training, lora

    def __init__(self, model: "FlaxOPTPreTrainedModel", config: TrainConfig):
        if model.get_decoder().scan_layers:
            raise ConfigError(
                "a model with scan_layers is trained with train_step and "
                "opt_flax.training_checkpoints.TrainingCheckpoints"
            )
        super().__init__(model, config)

    @property
    def team(self) -> Team:
        """The processes that train the model together."""
        return sharding.team_of(self.model.mesh)

    @property
    def row_parts(self) -> tuple[int, int]:
        """Which part of a batch's rows this process has, from 0, and how many there are."""
        return sharding.row_parts(self.model.mesh)

    @property
    def is_spread(self) -> bool:
        """Whether tensors are spread over devices."""
        return self.model.mesh is not None

    @property
    def updates(self) -> int:
        """Optimizer steps taken."""
        return int(self._adam().count[...])

    @updates.setter
    def updates(self, count: int) -> None:
        for variable in (self._adam().count, self.optimizer.step):
            value = jnp.asarray(count, variable.dtype)
            variable.set_value(sharding.place(value, self.model.mesh))

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step (`train_step`) with dropout."""
        self.model.train()
        own = sharding.spread_rows(as_batch(batch), self.model.mesh)
        return super().step(own, step)

    def get(self, slot: Slot, spec: ParamSpec) -> NDArray[Any]:
        """Values of a trained parameter, float32 in the canonical layout."""
        return as_array(self._variable(slot, spec)[...])[: spec.shape[0]].astype(np.float32)

    def put(self, slot: Slot, spec: ParamSpec, values: NDArray[Any]) -> None:
        """Replaces them."""
        variable = self._variable(slot, spec)
        variable.set_value(spread_values(self.model, spec, values, variable.dtype))

    def save_parts(self, folder: Path) -> None:
        """Writes the tensors of a checkpoint, every process the parts that it has."""
        with _told("cannot be written"), StandardCheckpointer() as writer:
            writer.save(folder.absolute(), self._arrays())

    def load_parts(self, folder: Path) -> None:
        """Reads them back, on any mesh or none."""
        arrays = self._arrays()
        wanted = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
            for name, value in arrays.items()
        }
        with _told("cannot be read"), StandardCheckpointer() as reader:
            about: Any = reader.metadata(folder.absolute())
            shapes = {name: tuple(x.shape) for name, x in about.item_metadata.items()}
            own = {name: tuple(value.shape) for name, value in arrays.items()}
            check_parts(folder, self._unpadded(shapes), self._unpadded(own))
            # Not strict about shapes: a vocabulary has as many rows of padding as its mesh needs.
            found: Any = reader.restore(folder.absolute(), wanted, strict=False)
        for slot in SLOTS:
            for spec in self.specs:
                self._variable(slot, spec).set_value(found[f"{slot}/{spec.name}"])

    def _arrays(self) -> dict[str, Array]:
        """All that training changes, by the names of a checkpoint."""
        values = {
            f"{slot}/{spec.name}": self._variable(slot, spec)[...]
            for spec in self.specs for slot in SLOTS
        }  # fmt: skip
        return sharding.place(values, self.model.mesh)

    def _unpadded(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Shapes as they are without rows of padding, where there are as many as may be."""
        plain = {f"{slot}/{spec.name}": spec for spec in self.specs for slot in SLOTS}
        found = dict(shapes)
        for name, shape in shapes.items():
            spec = plain.get(name)
            if spec and spec.axes[0] == "vocab" and shape[0] >= spec.shape[0]:
                found[name] = (spec.shape[0], *shape[1:])
        return found

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


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Makes a failure of Orbax' one line."""
    try:
        yield
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CheckpointError(f"parts of a checkpoint {what}: {reason}") from error
