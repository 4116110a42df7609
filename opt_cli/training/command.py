"""`opt-lm train`: a model and data in, a run's folder with the trained model out."""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_cli import console
from opt_cli.backends import AUTO, Backend, load_backend
from opt_cli.devices import Coordinator, Mesh, Process, spread
from opt_cli.training.options import with_settings
from opt_core.errors import ConfigError, DataError, TrainingError

if TYPE_CHECKING:
    from opt_core import OPTConfig, TrainConfig
    from opt_core.data import TrainingData
    from opt_core.team import Team
    from opt_core.training import RunResult

CLASSES = {
    "text": "OPTForCausalLM",
    "classification": "OPTForSequenceClassification",
    "qa": "OPTForQuestionAnswering",
}
"""Each task and the class of model it trains."""


@with_settings
def train(
    model: Annotated[
        str,
        typer.Argument(
            help='Folder, hub id, or "mini"; a size to start from scratch.', metavar="MODEL"
        ),
    ],
    data: Annotated[
        Path, typer.Argument(help="Folder of `opt-lm prepare`, or a file of data.", metavar="DATA")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run.", metavar="RUN")],
    given: dict[str, Any],
    validation: Annotated[
        Path | None, typer.Option(help="Data to validate on, like DATA.", metavar="DATA")
    ] = None,
    task: Annotated[str, typer.Option(help="text, classification or qa.", metavar="NAME")] = "text",
    backend: Backend = AUTO,
    device: Annotated[
        str | None,
        typer.Option(help='Device of the torch backend, such as "cuda".', metavar="NAME"),
    ] = None,
    mesh: Mesh = None,
    coordinator: Coordinator = None,
    process: Process = None,
    preset: Annotated[
        str | None,
        typer.Option(help="Start from OPT's own recipe of a size: opt-125m ...", metavar="NAME"),
    ] = None,
    epochs: Annotated[
        float | None, typer.Option(help="Times through the data, for --max-steps.", metavar="X")
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Start from random weights.")
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on from the run's last checkpoint, if it has one; also to more --max-steps.",
        ),
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write RUN/tensorboard as well.")
    ] = False,
    wandb: Annotated[
        bool, typer.Option("--wandb", help="Send the figures to Weights & Biases as well.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Train a model, or fine-tune it.

    RUN gets metrics.jsonl, checkpoints, and in the end model/, a Hugging Face folder with a model
    card. The same command with --resume goes on where a killed one stopped, to the same result;
    with more --max-steps it goes on to them, at the learning rates of a run of that length.
    """
    from opt_cli.training import trackers
    from opt_cli.training.progress import training_progress
    from opt_core.data import Batches
    from opt_core.training import run
    from opt_core.training.run_folder import RunFolder

    if task not in CLASSES:
        raise ConfigError(f"--task: expected {', '.join(CLASSES)}, received {task!r}")
    if device is not None and backend != "torch":
        raise ConfigError(f"--device is for the torch backend; {backend} places its arrays itself")
    config = _settings(preset, given)
    about = {
        "model": model, "data": str(data), "validation": validation and str(validation),
        "task": task, "backend": backend, "from_scratch": from_scratch,
    }  # fmt: skip
    with spread(mesh, backend, coordinator, process) as (devices, team):
        own = about | asdict(config) | {"out": str(out), "resume": resume, "epochs": epochs}
        team.check_same("settings", own)  # before one is refused and others wait for it
        is_new = team.first(lambda: not out.exists() or (out.is_dir() and not any(out.iterdir())))
        if not is_new and not resume:
            raise TrainingError(f"{out}: already exists; --resume goes on with it")
        done = max(RunFolder(out).steps(), default=0)
        source, model_config = team.together(lambda: _model(model, from_scratch))
        with _ends_cleanly(out, is_new, team.is_first):
            opened = _open_in_turn(
                team, lambda: _open(data, task, model_config, config, validation, source, out)
            )
            if epochs is not None:
                if "max_steps" in given:
                    raise ConfigError("--epochs and --max-steps: give one of them")
                if not 0 < epochs < math.inf:
                    raise ConfigError(f"--epochs: expected a number > 0, received {epochs}")
                config = config.replace(
                    max_steps=math.ceil(epochs * len(opened.train) / config.batch_size)
                )
            if config.eval_every and opened.validation is None:
                raise ConfigError("--eval-every needs data to validate on: --validation")
            validate: Callable[[], Iterable[Any]] | None = None
            if (held_out := opened.validation) is not None:
                validate = lambda: Batches(held_out, config.batch_size, 0, shuffle=False, epochs=1)  # noqa: E731
            trainer = team.together(
                lambda: _trainer(
                    *(backend, task, source or model, config, opened.model_config),
                    *(from_scratch, device, devices),
                )
            )
            batches = _batches(opened.train, config, trainer)
            following: list[Any] = []
            if tensorboard and team.is_first:
                following.append(trackers.tensorboard(out / "tensorboard"))
            if wandb and team.is_first:
                following.append(trackers.wandb(out, {**about, **asdict(config)}))
            with training_progress(config.max_steps, done, following) as on_record:
                result = run(trainer, batches, config, out, validate, resume, about, on_record)
        if team.is_first:
            _finish(result, source, json)


def _open_in_turn(team: "Team", act: Callable[[], "TrainingData"]) -> "TrainingData":
    """Opens the data, first in the first process, which may have to prepare them for all."""
    found: list[TrainingData] = []
    team.together(lambda: found.append(act()) if team.is_first else None)
    team.together(lambda: None if team.is_first else found.append(act()))
    train = found[0].train
    ends = [repr(train[i]) for i in (0, len(train) // 2, len(train) - 1)]
    team.check_same("data", f"{len(train)} examples, {sha256(''.join(ends).encode()).hexdigest()}")
    return found[0]


def _batches(train: Any, config: "TrainConfig", trainer: Any) -> Any:
    """The batches of this process: its rows of each."""
    from opt_core.data import Batches

    host, hosts = trainer.row_parts
    if config.batch_size % (hosts * config.gradient_accumulation_steps):
        raise ConfigError(
            f"--batch-size: {config.batch_size} rows cannot be shared by data x fsdp = {hosts}"
            f" devices in {config.gradient_accumulation_steps} equal parts each"
        )
    return Batches(train, config.batch_size, config.seed, host=host, hosts=hosts)


@contextmanager
def _ends_cleanly(out: Path, is_new: bool, is_first: bool) -> Iterator[None]:
    """Leaves nothing of a new run that fails before its first step; says how to go on later."""
    from opt_core.training import run_folder

    try:
        yield
    except BaseException as error:
        if not is_first:
            raise
        if not run_folder.has_begun(out):
            if is_new:
                shutil.rmtree(out, ignore_errors=True)
        elif isinstance(error, KeyboardInterrupt):
            steps = run_folder.RunFolder(out).steps()
            place = f"after step {steps[-1]}" if steps else "from the start: no checkpoint yet"
            console.note(f"interrupted; the same command with --resume goes on {place}")
        raise


def _settings(preset: str | None, given: dict[str, Any]) -> "TrainConfig":
    from opt_core import TrainConfig

    try:
        return TrainConfig(**given) if preset is None else TrainConfig.from_preset(preset, **given)
    except ConfigError as error:
        names = sorted(TrainConfig.__dataclass_fields__, key=len, reverse=True)
        name = next((name for name in names if str(error).startswith(f"{name}:")), None)
        message = str(error) if name is None else console.option(name) + str(error)[len(name) :]
        raise ConfigError(message) from None


def _model(name: str, from_scratch: bool) -> tuple[Path | None, "OPTConfig"]:
    """The model's folder, where it has one, and its configuration."""
    from opt_core import OPTConfig
    from opt_core.adapters.tensors import is_adapter
    from opt_core.hub import resolve
    from opt_core.presets import PRESETS

    if from_scratch and name in PRESETS:
        return None, OPTConfig.from_preset(name)
    folder = resolve(name)
    if is_adapter(folder):
        raise ConfigError(f"--model: {name} is an adapter; merge it first: opt-lm convert")
    return folder, OPTConfig.from_pretrained(folder if folder.is_dir() else folder.parent)


def _open(
    data: Path, task: Any, model_config: "OPTConfig", config: "TrainConfig",
    validation: Path | None, source: Path | None, out: Path,
) -> "TrainingData":  # fmt: skip
    from opt_core.data import open_data

    processes = os.cpu_count() or 1
    try:
        with console.progress(f"opening {data}") as progress:
            return open_data(
                data, task, model_config, config, validation, source, out, processes, progress,
                console.note,
            )  # fmt: skip
    except DataError as error:  # settings as the command line spells them
        names = r"\b(sequence_length(?= is )|validation$)"
        spelled = re.sub(names, lambda name: console.option(name[0]), str(error))
        raise DataError(spelled) from None


def _trainer(
    backend: str, task: str, source: Any, config: "TrainConfig", model_config: "OPTConfig",
    from_scratch: bool, device: str | None, devices: Any,
) -> Any:  # fmt: skip
    import warnings

    from conversion.backends import BACKENDS

    cls = load_backend(backend, CLASSES[task])
    trainer = import_module(f"{BACKENDS[backend].module}.trainer").Trainer
    with warnings.catch_warnings():
        # A head that is new is what this command is for.
        warnings.filterwarnings("ignore", ".*freshly initialised and needs training")
        return trainer.make(cls, source, config, model_config, from_scratch, device, devices)


def _finish(result: "RunResult", source: Path | None, json: bool) -> None:
    """Puts the tokenizer beside the model and says how it went."""
    if source is not None:
        from conversion.sidecar_files import copy_sidecar_files

        copy_sidecar_files(source if source.is_dir() else source.parent, result.model)
    if json:
        console.print_json(asdict(result) | {"model": str(result.model)})
        return
    if result.stopped is not None:
        console.note(f"stopped early: {result.stopped}")
    if result.skipped:
        console.note(f"{result.skipped} steps were skipped: loss or gradient not finite")
    summary = [f"{result.steps} steps"]
    if result.loss is not None:
        summary.append(f"loss {result.loss:.4f}")
    if result.best_loss is not None:
        summary.append(f"validation loss {result.best_loss:.4f} at step {result.best_step}")
    console.write(f"{result.model}: {', '.join(summary)}\n")
