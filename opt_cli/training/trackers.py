"""Where else a training run's records go: TensorBoard's event files, Weights & Biases."""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from opt_core.errors import ConfigError

OnRecord = Callable[[dict[str, Any]], None]


@contextmanager
def tensorboard(folder: Path) -> Iterator[OnRecord]:
    """Writes TensorBoard's event files.

    Args:
        folder: Where to.

    Yields:
        A function to call with each record.

    Raises:
        ConfigError: The library that writes them is not there.
    """
    make = _library("tensorboardX", "tensorboard").SummaryWriter
    writer: Any = None

    def write(record: dict[str, Any]) -> None:
        nonlocal writer
        # Not before the first record: it makes its folder, and a new run's must be empty.
        writer = writer or make(str(folder))
        for name, value in _numbers(record).items():
            writer.add_scalar(name, value, record["step"])

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


@contextmanager
def wandb(folder: Path, settings: Mapping[str, Any]) -> Iterator[OnRecord]:
    """Sends records to Weights & Biases; WANDB_MODE=offline keeps them in the run's folder.

    A run that is resumed goes on as the same run there.

    Args:
        folder: The run's folder; "wandb" in it has the library's own files.
        settings: What the run was started with, to be shown beside the curves.

    Yields:
        A function to call with each record.

    Raises:
        ConfigError: The library is not there.
    """
    library = _library("wandb", "wandb")
    run: Any = None

    def write(record: dict[str, Any]) -> None:
        nonlocal run
        if run is None:  # as above, not before the first record
            run = library.init(
                project=os.environ.get("WANDB_PROJECT", "opt-lm"),
                name=folder.absolute().name, id=_kept_id(folder / "wandb" / "opt-lm-run-id"),
                resume="allow", dir=str(folder), config=dict(settings),
                settings={"console": "off"},
            )  # fmt: skip
        run.log(_numbers(record), step=record["step"])

    try:
        yield write
    except BaseException:
        if run is not None:
            run.finish(exit_code=1)
        raise
    if run is not None:
        run.finish()


def _library(name: str, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        raise ConfigError(f"--{extra} needs a library: pip install 'opt-lm[{extra}]'") from None


def _numbers(record: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in record.items() if isinstance(value, float)}


def _kept_id(file: Path) -> str:
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(secrets.token_hex(4), encoding="utf-8")
    return file.read_text(encoding="utf-8")
