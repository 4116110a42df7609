"""A training run from its first step, or its last checkpoint, to the final model.

What a run does is written here once; a framework's `Trainer` only computes. What a step drops
depends on the seed and the step's number alone, so weights, optimizer and position are all there is
to save: a run that was killed gives the same numbers as one that was not.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, InputError, TrainingError
from opt_core.model_card import FILE as CARD
from opt_core.params import Head, ParamSpec
from opt_core.team import Team
from opt_core.training.config import TrainConfig
from opt_core.training.microbatches import as_batch
from opt_core.training.run_card import write_run_card
from opt_core.training.run_folder import ADAPTER_FOLDER, MODEL_FOLDER, RunFolder, RunState, open_run

Slot = Literal["value", "mean", "square"]
SLOTS: tuple[Slot, ...] = ("value", "mean", "square")
"""A trained parameter, and AdamW's running means of its gradient and of the gradient's square."""


_FREE = frozenset([
    "dropout", "attention_dropout", "layerdrop", "init_std", "use_cache", "dtype", "torch_dtype",
    "id2label", "problem_type", "bos_token_id", "eos_token_id",
])  # fmt: skip
"""Fields of the configuration that may change between saving and going on."""


class Trainer(Protocol):
    """A model and its optimizer in some framework; `opt_*.trainer` has one each."""

    @property
    def specs(self) -> Sequence[ParamSpec]:
        """The parameters that training changes."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """The values in which a checkpoint must agree with the model."""
        ...

    @property
    def team(self) -> Team:
        """The processes that train the model together."""
        ...

    @property
    def row_parts(self) -> tuple[int, int]:
        """Which part of a batch's rows this process computes, from 0, and how many there are."""
        ...

    @property
    def is_spread(self) -> bool:
        """Whether tensors are spread over devices: checkpoints are written in parts then."""
        ...

    updates: int
    """Optimizer steps taken."""

    def step(self, batch: Any, step: int) -> tuple[float, float]:
        """Takes one step on this process' rows; returns the loss and the gradient's norm.

        If one of them is not finite, nothing has changed.
        """
        ...

    def evaluate(self, batches: Iterable[Any]) -> float:
        """The mean loss over whole batches, without dropout."""
        ...

    def get(self, slot: Slot, spec: ParamSpec) -> NDArray[Any]:
        """Values of a trained parameter, float32 in the canonical layout."""
        ...

    def put(self, slot: Slot, spec: ParamSpec, values: NDArray[Any]) -> None:
        """Replaces them."""
        ...

    def save_parts(self, folder: Path) -> None:
        """Writes the tensors of a checkpoint, every process the parts that it has."""
        ...

    def load_parts(self, folder: Path) -> None:
        """Reads them back, on any mesh or none."""
        ...

    def export(self, folder: Path) -> None:
        """Writes the model as a Hugging Face folder, adapters merged."""
        ...

    def export_adapter(self, folder: Path, base: str) -> None:
        """Writes the adapters as PEFT does."""
        ...


class Position(Protocol):
    """Batches that can be gone back to: `opt_core.data.batches.Batches`."""

    def __next__(self) -> Any:
        """The next batch."""
        ...

    def state(self) -> dict[str, Any]:
        """Where they are."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes back there."""
        ...


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        model: The final model's folder.
        steps: Steps done.
        loss: The last step's loss; None where this process did no step.
        best_step: The step the model is of, where there were validations.
        best_loss: Its validation loss.
        skipped: Steps skipped because they were not finite.
        stopped: Why the run ended early, or None.
    """

    model: Path
    steps: int
    loss: float | None
    best_step: int | None
    best_loss: float | None
    skipped: int
    stopped: str | None


def run(
    trainer: Trainer,
    batches: Position,
    config: TrainConfig,
    folder: Path,
    validation: Callable[[], Iterable[Any]] | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    watch: Callable[[dict[str, Any]], None] | None = None,
) -> RunResult:
    """Trains a model, writing everything down in a folder.

    Args:
        trainer: The model and its optimizer.
        batches: What to train on, without end.
        config: How.
        folder: The run's folder (`opt_core.training.run_folder`).
        validation: Makes the batches of a validation.
        resume: Go on from the last checkpoint, if the folder has one; `max_steps` may be another
            than before, and the learning rate follows it from there on.
        about: What else the run was started with, such as the model's name, for run.json.
        watch: Called with each line of the metrics as it is written.

    Raises:
        TrainingError: The folder cannot be used, or too many steps in a row were not finite.
        CheckpointError: A checkpoint cannot be written, or does not fit the model.
        InputError: The batches ended too soon, or validations are asked for without batches.
    """
    if config.eval_every and validation is None:
        raise InputError("eval_every: expected batches to validate on, received none")
    settings, team = {**(about or {}), "config": asdict(config)}, trainer.team
    team.check_same("settings", settings)
    with open_run(folder, settings, resume, team) as home:
        state = _Run(trainer, batches, config, home, validation, watch or (lambda record: None))
        loss = state.train()
        return _finish(trainer, config, home, state.state, loss, about or {})


class _Run:
    """A run under way."""

    def __init__(
        self,
        trainer: Trainer,
        batches: Position,
        config: TrainConfig,
        home: RunFolder,
        validation: Callable[[], Iterable[Any]] | None,
        watch: Callable[[dict[str, Any]], None],
    ) -> None:
        self.trainer, self.batches, self.config, self.home = trainer, batches, config, home
        self.validation, self.watch = validation, watch
        self.state = RunState(0, 0, batches.state(), trainer.identity)
        steps = home.team.first(home.steps)
        if steps:
            self.state = restore(trainer, home, steps[-1])
            batches.restore(self.state.batches)
        home.rewind(self.state.step)

    def train(self) -> float | None:
        """Takes the steps that are left and returns the last one's loss."""
        config, state, loss = self.config, self.state, None
        saved = state.step if self.home.team.first(self.home.steps) else None
        while state.step < config.max_steps and state.stopped is None:
            loss = self._step()
            is_last = state.step == config.max_steps
            if _is_due(config.eval_every, state.step) or (config.eval_every and is_last):
                self._validate()
            is_last = is_last or state.stopped is not None
            if is_last or _is_due(config.save_every, state.step) or state.best_step == state.step:
                self._save()
                saved = state.step
        if saved != state.step:
            self._save()
        return loss

    def _step(self) -> float:
        state, step, start = self.state, self.state.step, time.monotonic()
        try:
            batch = next(self.batches)
        except StopIteration:
            raise InputError(
                f"the batches ended at step {step} of {self.config.max_steps}"
            ) from None
        loss, norm = self.trainer.step(batch, step)
        finite = math.isfinite(loss) and math.isfinite(norm)
        state.step += 1
        state.skipped_in_row = 0 if finite else state.skipped_in_row + 1
        state.skipped += not finite
        tokens = int(np.size(as_batch(batch)["input_ids"])) * self.trainer.row_parts[1]
        record: dict[str, Any] = {
            "step": state.step,
            "loss": loss if finite else None,
            "learning_rate": self.config.learning_rate_at(step),
            "grad_norm": norm if finite else None,
            "tokens_per_s": round(tokens / max(time.monotonic() - start, 1e-9), 1),
        }
        self._log(record if finite else record | {"skipped": True})
        if state.skipped_in_row > self.config.max_skipped_steps:
            raise TrainingError(
                f"diverged: loss or gradient not finite in {state.skipped_in_row} steps in a row, "
                f"the last one step {state.step}; lower learning_rate or max_grad_norm and look at "
                "the data"
            )
        return loss

    def _validate(self) -> None:
        assert self.validation is not None
        state, config = self.state, self.config
        loss = self.trainer.evaluate(_first(self.validation(), config.eval_batches))
        is_best = math.isfinite(loss) and (state.best_loss is None or loss < state.best_loss)
        if is_best:
            state.best_step, state.best_loss, state.worse = state.step, loss, 0
        else:
            state.worse += 1
        if config.patience and state.worse >= config.patience:
            state.stopped = f"no better validation loss in {state.worse} validations"
        shown = loss if math.isfinite(loss) else None
        self._log({"step": state.step, "eval_loss": shown, "best": is_best})

    def _save(self) -> None:
        self.state.updates = self.trainer.updates
        self.state.batches = self.batches.state()
        trainer = self.trainer
        tensors = trainer.save_parts if trainer.is_spread else pending(trainer)
        self.home.save(self.state, tensors, self.config.keep_checkpoints)

    def _log(self, record: dict[str, Any]) -> None:
        self.home.log(record)
        if self.home.team.is_first:
            self.watch(record)


def identity(config: OPTConfig, head: Head) -> dict[str, Any]:
    """The values in which a checkpoint must agree with a model: head and computation."""
    values = {k: v for k, v in config.to_dict().items() if k not in _FREE}
    return json.loads(json.dumps(values | {"head": head}))


def pending(trainer: Trainer) -> list[PendingTensor]:
    """The tensors of a checkpoint: every trained parameter and its two running means."""
    return [
        PendingTensor(
            f"{slot}/{spec.name}", spec.shape, np.dtype(np.float32),
            lambda slot=slot, spec=spec: trainer.get(slot, spec),
        )
        for spec in trainer.specs for slot in SLOTS
    ]  # fmt: skip


def restore(trainer: Trainer, home: RunFolder, step: int) -> RunState:
    """Reads a checkpoint into a trainer.

    Args:
        trainer: Of the model that was saved.
        home: The run's folder.
        step: Which checkpoint.

    Raises:
        CheckpointError: It is damaged, or of another model.
    """
    state, stored = home.team.together(lambda: home.load(step))
    where = f"{home.path}: the checkpoint of step {step}"
    ours = trainer.identity
    if differences := [
        f"{k}: expected {ours.get(k)!r}, found {state.model.get(k)!r}"
        for k in sorted(ours.keys() | state.model.keys())
        if ours.get(k) != state.model.get(k)
    ]:
        raise CheckpointError(f"{where} is of another model: {'; '.join(differences)}")
    if isinstance(stored, Path):
        home.team.together(lambda: trainer.load_parts(stored))
        trainer.updates = state.updates
        return state
    shapes = {f"{slot}/{spec.name}": spec.shape for spec in trainer.specs for slot in SLOTS}
    if shapes != {name: tensor.shape for name, tensor in stored.items()}:
        odd = sorted(shapes.keys() ^ stored.keys())
        raise CheckpointError(f"{where} has other parameters: {', '.join(odd[:4]) or 'shapes'}")
    for spec in trainer.specs:
        for slot in SLOTS:
            trainer.put(slot, spec, stored[f"{slot}/{spec.name}"].read())
    trainer.updates = state.updates
    return state


def check_parts(
    folder: Path, found: Mapping[str, tuple[int, ...]], own: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuses the parts of a checkpoint that are not of the tensors to be restored.

    Args:
        folder: Where they lie.
        found: Name -> shape there.
        own: Name -> shape of what is to be restored.

    Raises:
        CheckpointError: Names or shapes differ.
    """
    if odd := sorted(k for k in found.keys() | own.keys() if found.get(k) != own.get(k)):
        listed = "; ".join(f"{k}: expected {own.get(k)}, found {found.get(k)}" for k in odd[:4])
        raise CheckpointError(f"{folder} has other parameters: {listed}")


def _finish(
    trainer: Trainer, config: TrainConfig, home: RunFolder, state: RunState, loss: float | None,
    about: Mapping[str, Any],
) -> RunResult:  # fmt: skip
    """Writes the final model: the best one where there were validations."""
    if state.best_step is not None and state.best_step != state.step:
        restore(trainer, home, state.best_step)
    model = home.path / MODEL_FOLDER
    trainer.export(model)
    is_first = home.team.is_first
    if is_first and (loss is not None or not (model / CARD).exists()):  # or what was put into it
        write_run_card(home.path, config, about, trainer.identity, state)  # since stays
    if config.lora_rank:
        adapter = home.path / ADAPTER_FOLDER
        if is_first and adapter.exists():  # of fewer steps
            shutil.rmtree(adapter)
        trainer.export_adapter(adapter, str(about.get("model", "")))
    return RunResult(
        model, state.step, loss, state.best_step, state.best_loss, state.skipped, state.stopped
    )


def _is_due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _first(batches: Iterable[Any], count: int) -> Iterator[Any]:
    for number, batch in enumerate(batches):
        if count and number >= count:
            return
        yield batch
