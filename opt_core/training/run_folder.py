"""The folder of a training run: its settings, a line per step, checkpoints and the final model.

    run.json                settings, and what is trained on what
    metrics.jsonl           one JSON object per step and per validation
    checkpoints/step-N/     state.safetensors (weights and optimizer), or parts/, a file or more of
                            each process; state.json (all the rest)
    model/, adapter/        what the run is for, in Hugging Face's and PEFT's layout

A checkpoint appears whole or not at all, and an older one goes only after a newer one has come.
Names and shapes in it are those of `ParamSpec`, whatever framework wrote it. Several processes
share one folder: the first one writes, but for the parts of a checkpoint, which are everyone's.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from opt_core.checkpoints.atomic import locked, new_folder
from opt_core.checkpoints.safetensors_format import (
    PendingTensor,
    read_safetensors,
    write_safetensors,
)
from opt_core.checkpoints.tensors import StoredTensor
from opt_core.errors import CheckpointError, OPTError, TrainingError
from opt_core.json_files import read_json, write_json
from opt_core.team import Team

RUN_FILE, METRICS_FILE, MODEL_FOLDER, ADAPTER_FOLDER = (
    "run.json", "metrics.jsonl", "model", "adapter",
)  # fmt: skip
_STATE, _TENSORS, _PARTS = "state.json", "state.safetensors", "parts"
_STEP = re.compile(r"step-(\d{8})")
_STEPS = "config.max_steps"


@dataclass
class RunState:
    """Where a run is, besides weights and optimizer.

    Attributes:
        step: Steps done.
        updates: Those of them that changed the weights.
        batches: Position in the data.
        model: What the model must agree in with a checkpoint of it.
        best_step: The step of the best validation, or None.
        best_loss: Its loss.
        worse: Validations since then.
        skipped: Steps skipped in all.
        skipped_in_row: Steps skipped just now.
        stopped: Why the run ended before its last step, or None.
    """

    step: int
    updates: int
    batches: dict[str, Any]
    model: dict[str, Any]
    best_step: int | None = None
    best_loss: float | None = None
    worse: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    stopped: str | None = None


class RunFolder:
    """A run's folder; `open_run` makes or finds it.

    Attributes:
        path: The folder.
        team: The processes that share it.
    """

    def __init__(self, path: Path, team: Team | None = None) -> None:
        self.path, self.team = path, team or Team()
        self._metrics: TextIO | None = None

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, oldest first."""
        home = self.path / "checkpoints"
        names = [path.name for path in home.iterdir()] if home.is_dir() else []
        return sorted(int(match[1]) for name in names if (match := _STEP.fullmatch(name)))

    def save(
        self,
        state: RunState,
        tensors: Sequence[PendingTensor] | Callable[[Path], None],
        keep: int,
    ) -> None:
        """Writes a checkpoint, then removes those not to be kept.

        Args:
            state: Where the run is.
            tensors: Weights and optimizer; or a function that writes this process' parts of them
                into a folder.
            keep: Newest checkpoints to keep, besides the best one.

        Raises:
            CheckpointError: The disk refuses; earlier checkpoints are still there.
        """
        folder, team = self._checkpoint(state.step), self.team
        try:
            self._flush_metrics()
            with contextlib.ExitStack() as stack:
                stage = team.first(lambda: stack.enter_context(new_folder(folder)))
                team.together(lambda: _write(stage, state, tensors, team.is_first))
                team.together(stack.close)  # the folder takes its place
        except (OPTError, OSError) as error:
            steps = self.steps()
            left = f"the last good one is of step {steps[-1]}" if steps else "there is none yet"
            raise CheckpointError(f"checkpoint not written: {error}; {left}") from None
        kept = {*self.steps()[-keep:], state.best_step}
        for step in self.steps() if team.is_first else ():
            if step not in kept:
                shutil.rmtree(self._checkpoint(step), ignore_errors=True)

    def load(self, step: int) -> tuple[RunState, dict[str, StoredTensor] | Path]:
        """Reads a checkpoint.

        Returns:
            Where the run was, and the tensors; or the folder of their parts.

        Raises:
            CheckpointError: It is damaged.
        """
        folder = self._checkpoint(step)
        try:
            values = read_json(folder / _STATE, CheckpointError)
            is_whole = not (folder / _PARTS).is_dir()
            return RunState(**values), (
                read_safetensors(folder / _TENSORS) if is_whole else folder / _PARTS
            )
        except (CheckpointError, OSError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: damaged checkpoint ({error}); remove it to go on from an earlier one"
            ) from None

    def log(self, record: Mapping[str, Any]) -> None:
        """Adds a line to the metrics.

        Raises:
            TrainingError: The disk refuses.
        """
        if not self.team.is_first:
            return
        try:
            if self._metrics is None:
                self._metrics = (self.path / METRICS_FILE).open("a", encoding="utf-8")
            self._metrics.write(json.dumps(record) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise self._refused(METRICS_FILE, error) from None

    def rewind(self, step: int) -> None:
        """Removes metrics of steps after `step`: they are going to be done again."""
        if not self.team.is_first:
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= step]
        part = self.path / f".{METRICS_FILE}.tmp"
        try:
            part.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")
            part.replace(self.path / METRICS_FILE)
        except OSError as error:
            raise self._refused(METRICS_FILE, error) from None

    def close(self) -> None:
        """Closes the metrics."""
        if self._metrics is not None:
            with contextlib.suppress(OSError):  # a full disk was told of already
                self._metrics.close()
            self._metrics = None

    def _checkpoint(self, step: int) -> Path:
        return self.path / "checkpoints" / f"step-{step:08}"

    def _flush_metrics(self) -> None:
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())

    def _refused(self, name: str, error: OSError) -> TrainingError:
        return TrainingError(f"{self.path / name}: cannot be written: {error.strerror or error}")


@contextlib.contextmanager
def open_run(
    path: Path, settings: Mapping[str, Any], resume: bool, team: Team | None = None
) -> Generator[RunFolder]:
    """Makes the folder of a run, or finds it again; only one run at a time has it.

    Args:
        path: The folder.
        settings: What the run is: what it was started with must be equal, `config.max_steps`
            aside.
        resume: Whether the run may be there already.
        team: The processes of the run; None: this one.

    Raises:
        TrainingError: It is there and `resume` is not asked for, it was started with other
            settings, another process has it, or the disk refuses.
    """
    team = team or Team()
    with contextlib.ExitStack() as stack:
        folder = RunFolder(path, team)
        team.together(
            lambda: stack.enter_context(_held(folder, settings, resume)) if team.is_first else None
        )
        yield folder


@contextlib.contextmanager
def _held(folder: RunFolder, settings: Mapping[str, Any], resume: bool) -> Generator[None]:
    """The first process' part in `open_run`."""
    path = folder.path
    wanted: dict[str, Any] = json.loads(json.dumps(settings))
    about = path / RUN_FILE
    try:
        if not resume and os.path.lexists(path) and not _is_new(path):
            raise TrainingError(f"{path}: already exists; resume it or name another folder")
        path.mkdir(parents=True, exist_ok=True)
        with locked(path, TrainingError(f"{path}: another process is training here")):
            if about.exists():
                _check_settings(path, read_json(about, TrainingError), wanted)
            write_json(about, wanted)  # the number of steps may have changed
            try:
                yield
            except BaseException:
                if not has_begun(path):  # or the settings at fault would have to stay
                    about.unlink(missing_ok=True)
                    (path / METRICS_FILE).unlink(missing_ok=True)
                raise
            finally:
                folder.close()
    except OSError as error:
        raise TrainingError(f"{path}: cannot be used: {error.strerror or error}") from None


def has_begun(path: Path) -> bool:
    """Whether a step of a run has been written down."""
    metrics = path / METRICS_FILE
    return bool(RunFolder(path).steps()) or (metrics.is_file() and metrics.stat().st_size > 0)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; the last one may have been cut off and is left out then."""
    try:
        lines = (path / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError(f"{path / METRICS_FILE}: not readable: {error}") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record: Any = json.loads(line)
            record["step"]
        except (ValueError, TypeError, KeyError):
            if number == len(lines):
                break
            raise TrainingError(f"{path / METRICS_FILE}: line {number} is damaged") from None
        records.append(record)
    return records


def _write(
    stage: Path,
    state: RunState,
    tensors: Sequence[PendingTensor] | Callable[[Path], None],
    is_first: bool,
) -> None:
    """Writes what is this process' to write of a checkpoint."""
    if callable(tensors):
        tensors(stage / _PARTS)
    elif is_first:
        write_safetensors(stage / _TENSORS, tensors)
    if is_first:
        write_json(stage / _STATE, asdict(state))


def _is_new(path: Path) -> bool:
    """Whether nothing is in a folder but what was prepared for a run."""
    return path.is_dir() and all(entry.name.startswith("data") for entry in path.iterdir())


def _check_settings(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Says what differs, down to single settings; a run may be made longer."""
    ours, theirs = _flat(wanted), _flat(found)
    names = [k for k in sorted(ours.keys() | theirs.keys()) if ours.get(k) != theirs.get(k)]
    if _STEPS in names and _STEPS in ours and _STEPS in theirs:
        done = max(RunFolder(path).steps(), default=0)
        if ours[_STEPS] < done:
            raise TrainingError(f"{path}: max_steps={ours[_STEPS]}, but {done} steps are done")
        names.remove(_STEPS)
    if names:
        told = "; ".join(f"{k}: {theirs.get(k)!r}, now {ours.get(k)!r}" for k in names[:4])
        raise TrainingError(f"{path} was started with other settings: {told}")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{k}": v for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
        else:
            flat[name] = value
    return flat
