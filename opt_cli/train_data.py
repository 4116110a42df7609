"""What `opt-lm train` is given to train on, opened."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_cli import console
from opt_core.errors import DataError

if TYPE_CHECKING:
    from opt_core import OPTConfig, OPTTokenizer, TrainConfig

HELD_OUT = 0.05
"""Share of the documents of a text that are held out, where validations are asked for."""


@dataclass(frozen=True)
class Opened:
    """Data, ready for batches.

    Attributes:
        train: Examples to train on.
        validation: Examples to validate on, or None.
        model_config: The model's configuration, with the labels that the data has.
    """

    train: Any
    validation: Any
    model_config: "OPTConfig"


def open_data(
    task: str,
    data: Path,
    validation: Path | None,
    model: Path | None,
    model_config: "OPTConfig",
    config: "TrainConfig",
    out: Path,
) -> Opened:
    """Opens what to train on.

    Args:
        task: "text", "classification" or "qa".
        data: What to train on.
        validation: What to validate on; for text, what is held out of `data` by default.
        model: Folder of the model, with its tokenizer.
        model_config: The model's configuration.
        config: How to train.
        out: The run's folder; text that is not prepared yet is prepared in it.

    Raises:
        DataError: It is not what the task needs.
    """
    if task == "text":
        return _text(data, validation, model, model_config, config, out)
    tokenizer = _tokenizer(model)
    read = _classification if task == "classification" else _questions
    train, model_config = read(data, tokenizer, model_config, config, None)
    held_out = None
    if validation is not None:
        held_out, _ = read(validation, tokenizer, model_config, config, model_config)
    return Opened(train, held_out, model_config)


def _text(
    data: Path, validation: Path | None, model: Path | None, model_config: "OPTConfig",
    config: "TrainConfig", out: Path,
) -> Opened:  # fmt: skip
    from opt_core.data.token_blocks import BLOCKS_FILE

    if data.is_file():
        held_out = HELD_OUT if config.eval_every and validation is None else 0
        data = _prepared(data, model, config, out / "data", held_out)
    if validation is not None and validation.is_file():
        validation = _prepared(validation, model, config, out / "data-validation", 0) / "train"
    if (data / "train" / BLOCKS_FILE).exists():
        beside = data / "validation"
        if validation is None and (beside / BLOCKS_FILE).exists():
            validation = beside
        data = data / "train"
    train = _blocks(data, model_config, config)
    return Opened(
        train, None if validation is None else _blocks(validation, model_config, config),
        model_config,
    )  # fmt: skip


def _prepared(
    file: Path, model: Path | None, config: "TrainConfig", folder: Path, held_out: float
) -> Path:
    """Prepares a file of text, if a run before has not."""
    from opt_core.data.preparation import DataConfig, prepare

    if not folder.exists():
        how = DataConfig(config.sequence_length, held_out)
        is_new = not folder.parent.exists()
        try:
            with _naming(file), console.progress(f"preparing {file}") as progress:
                prepare([file], folder, _tokenizer(model), how, os.cpu_count() or 1, progress)
        except DataError as error:
            hint = "; or name other data: --validation" if "validation" in str(error) else ""
            raise DataError(f"{error}{hint}") from None
        finally:
            if is_new:
                with suppress(OSError):
                    folder.parent.rmdir()  # where nothing came of it
    return folder


@contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Puts the file's name before what is wrong with its data."""
    try:
        yield
    except DataError as error:
        is_named = str(error).startswith(str(file))
        raise DataError(str(error) if is_named else f"{file}: {error}") from None


def _blocks(folder: Path, model_config: "OPTConfig", config: "TrainConfig") -> Any:
    from opt_core.data.token_blocks import TokenBlocks

    blocks = TokenBlocks.open(folder)
    if blocks.vocab_size > model_config.vocab_size:
        raise DataError(
            f"{folder}: prepared for {blocks.vocab_size} tokens, the model has "
            f"{model_config.vocab_size}: another tokenizer"
        )
    if blocks.sequence_length != config.sequence_length:
        raise DataError(
            f"{folder}: blocks of {blocks.sequence_length} tokens, --sequence-length is "
            f"{config.sequence_length}"
        )
    return blocks


def _classification(
    data: Path, tokenizer: "OPTTokenizer", model_config: "OPTConfig", config: "TrainConfig",
    trained: "OPTConfig | None",
) -> tuple[Any, "OPTConfig"]:  # fmt: skip
    """Labelled texts, and the configuration with their labels; those of training data hold."""
    from opt_core.data.classification import encode_labelled_texts, read_labelled_texts

    names = None
    if trained is not None:
        known = trained.id2label or {}
        names = [known[i] for i in range(trained.num_labels)]
    texts = read_labelled_texts(data, names)
    labels = dict(enumerate(texts.label_names))
    model_config = model_config.replace(
        num_labels=len(labels), id2label=labels, problem_type="single_label_classification"
    )
    return encode_labelled_texts(texts, tokenizer, config.sequence_length), model_config


def _questions(
    data: Path, tokenizer: "OPTTokenizer", model_config: "OPTConfig", config: "TrainConfig",
    trained: "OPTConfig | None",
) -> tuple[Any, "OPTConfig"]:  # fmt: skip
    from opt_core.data.squad import encode_questions, read_questions

    length = config.sequence_length
    questions = read_questions(data)
    with _naming(data):
        windows = encode_questions(questions, tokenizer, length, length // 3)
    for reason, count in windows.dropped.items():
        console.note(f"{data}: {count} questions left out: {reason}")
    return windows.examples, model_config


def _tokenizer(model: Path | None) -> "OPTTokenizer":
    from opt_core import OPTTokenizer

    if model is None:
        raise DataError("a size alone has no tokenizer: name a folder of `opt-lm prepare`")
    return OPTTokenizer.from_pretrained(model)
