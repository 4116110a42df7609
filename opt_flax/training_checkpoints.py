"""Checkpoints of training: weights, optimizer and random state, to go on with another day.

Every device writes its own part while training goes on, and a checkpoint may be read on another
mesh than the one it was written on. What others are to read is written by `save_pretrained`.
"""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax import Array

from opt_core.errors import CheckpointError
from opt_core.training.loop import identity
from opt_flax.sharding import place

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTPreTrainedModel


class TrainingCheckpoints:
    """The checkpoints of one training run in a folder, the newest few of them.

    A checkpoint appears whole or not at all: what a killed process left behind is not looked at.
    On several hosts all processes call the same methods, and the folder is one they share.

        with TrainingCheckpoints("run", keep=3) as checkpoints:
            first = 0
            if checkpoints.latest_step is not None:
                first = checkpoints.restore_latest(model, optimizer)
            for step in range(first, config.max_steps):
                train_step(model, optimizer, batch(step), config, step)
                if (step + 1) % 100 == 0:
                    checkpoints.save(step + 1, model, optimizer)

    Args:
        folder: Where they are kept, one folder each; made if missing.
        keep: Checkpoints to keep; older ones are deleted.

    Raises:
        CheckpointError: `keep` is below 1, or the folder cannot be made.
    """

    def __init__(self, folder: str | PathLike[str], keep: int = 3):
        if type(keep) is not int or keep < 1:
            raise CheckpointError(f"keep: expected an integer of at least 1, received {keep!r}")
        self.folder = Path(folder).absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be used: {error}") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def latest_step(self) -> int | None:
        """The newest checkpoint's step, or None where there is no checkpoint."""
        return self._manager.latest_step()

    def save(
        self, step: int, model: "FlaxOPTPreTrainedModel", optimizer: nnx.Optimizer[Any]
    ) -> None:
        """Takes a copy of everything and writes it in the background.

        Args:
            step: Steps done: where training goes on.
            model: The model.
            optimizer: Its optimizer.

        Raises:
            CheckpointError: There is a checkpoint of this step or a later one, or an earlier one
                could not be written.
        """
        latest = self.latest_step
        if latest is not None and step <= latest:
            raise CheckpointError(f"{self.folder}: expected a step after {latest}, received {step}")
        items = ocp.args.Composite(
            about=ocp.args.JsonSave(_about(model, optimizer)),
            state=ocp.args.StandardSave(_arrays(model, optimizer)),
        )
        self._try(f"step {step}", lambda: self._manager.save(step, args=items))

    def wait(self) -> None:
        """Returns once all checkpoints are complete on disk.

        Raises:
            CheckpointError: One could not be written.
        """
        self._try("cannot be written", self._manager.wait_until_finished)

    def restore_latest(self, model: "FlaxOPTPreTrainedModel", optimizer: nnx.Optimizer[Any]) -> int:
        """Reads the newest checkpoint into a model and its optimizer, on the model's own mesh.

        Args:
            model: Of the configuration that was saved; dropout may differ.
            optimizer: From `make_optimizer`, as for the run that was saved.

        Returns:
            The step it was saved as.

        Raises:
            CheckpointError: There is none, it is damaged, or of another model or optimizer.
        """
        self.wait()
        step = self.latest_step
        if step is None:
            raise CheckpointError(f"{self.folder}: expected a training checkpoint, found none")
        what = f"step {step} cannot be restored"
        about = ocp.args.Composite(about=ocp.args.JsonRestore())
        saved = self._try(what, lambda: self._manager.restore(step, args=about)).about
        if differences := _differences(saved, _about(model, optimizer)):
            raise CheckpointError(f"{self.folder}: step {step} does not fit: {differences}")
        wanted = {
            name: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=value.sharding)
            for name, value in _arrays(model, optimizer).items()
        }
        # Not strict about shapes: a vocabulary has as many rows of padding as its mesh needs.
        state = ocp.args.Composite(state=ocp.args.StandardRestore(wanted, strict=False))
        found = self._try(what, lambda: self._manager.restore(step, args=state)).state
        for name, variable in _variables(model, optimizer).items():
            value = found[name]
            if _is_key(variable[...]):
                value = jax.random.wrap_key_data(value, impl=jax.random.key_impl(variable[...]))
            variable.set_value(value)
        return step

    def close(self) -> None:
        """Waits for what is being written and stops the threads that write."""
        self.wait()
        self._manager.close()

    def _try(self, what: str, act: Any) -> Any:
        try:
            return act()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{self.folder}: {what}: {reason}") from error


def _about(model: "FlaxOPTPreTrainedModel", optimizer: nnx.Optimizer[Any]) -> dict[str, Any]:
    """The facts in which a model and its optimizer must agree with a checkpoint."""
    names = [name for name in _variables(model, optimizer) if name.startswith("optimizer.")]
    return identity(model.config, model.head) | {
        "class": type(model).__name__,
        "dtype": model.dtype.name,
        "scan_layers": model.get_decoder().scan_layers,
        "optimizer": sorted({name.partition(".decoder.")[0] for name in names}),
    }


def _differences(saved: dict[str, Any], own: dict[str, Any]) -> str:
    names = [k for k in sorted(saved.keys() | own.keys()) if saved.get(k) != own.get(k)]
    return "; ".join(f"{k}: expected {own.get(k)!r}, received {saved.get(k)!r}" for k in names)


def _variables(model: "FlaxOPTPreTrainedModel", optimizer: nnx.Optimizer[Any]) -> dict[str, Any]:
    """Everything that training changes, by its path."""
    owners = {"model": model, "optimizer": optimizer}
    return {
        ".".join(map(str, (name, *path))): variable
        for name, owner in owners.items()
        for path, variable in nnx.to_flat_state(nnx.state(owner))
    }


def _arrays(model: "FlaxOPTPreTrainedModel", optimizer: nnx.Optimizer[Any]) -> dict[str, Array]:
    """Its values, all of them on the model's mesh; random keys as the integers they are made of."""
    values = {name: v[...] for name, v in _variables(model, optimizer).items()}
    return {
        name: jax.random.key_data(value) if _is_key(value) else value
        for name, value in place(values, model.mesh).items()
    }


def _is_key(value: Array) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
