"""Training data in whatever shape a user has it, opened: sources of examples for `Batches`."""

import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

from opt_core.config import OPTConfig
from opt_core.data.batches import Source
from opt_core.data.classification import encode_labelled_texts, read_labelled_texts
from opt_core.data.preparation import TRAIN, VALIDATION, DataConfig, prepare
from opt_core.data.squad import encode_questions, read_questions
from opt_core.data.token_blocks import BLOCKS_FILE, TokenBlocks
from opt_core.errors import DataError
from opt_core.text.adapter import as_tokenizer
from opt_core.text.tokenizer import OPTTokenizer
from opt_core.training.config import TrainConfig

Task = Literal["text", "classification", "qa"]

HELD_OUT = 0.05
"""Share of the documents of a text that are held out, where validations are asked for."""


@dataclass(frozen=True)
class TrainingData:
    """Data, ready for `Batches`.

    Attributes:
        train: Examples to train on.
        validation: Examples to validate on, or None.
        model_config: The model's configuration, with the labels that the data has.
    """

    train: Source
    validation: Source | None
    model_config: OPTConfig


def open_data(
    data: str | PathLike[str],
    task: Task,
    model_config: OPTConfig,
    config: TrainConfig,
    validation: str | PathLike[str] | None = None,
    tokenizer: OPTTokenizer | str | PathLike[str] | None = None,
    folder: str | PathLike[str] | None = None,
    processes: int = 1,
    progress: Callable[[int, int, str], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> TrainingData:
    """Opens what to train on.

    Text may be prepared already (`opt_core.data.prepare`: the folder, or one of its splits) or be a
    file, which is prepared first, unless it was in a run before. Labelled texts and questions are
    files (`read_labelled_texts`, `read_questions`).

    Args:
        data: What to train on.
        task: What the model learns: the next token of "text", "classification", or "qa", to answer
            questions.
        model_config: The model's configuration.
        config: How to train; its sequence_length says how long examples are.
        validation: What to validate on. For text by default what was held out when it was prepared:
            a twentieth of a file, if `config` asks for validations.
        tokenizer: A tokenizer, or the folder or hub id of one, which is read only if it is needed;
            None: the data is text prepared already.
        folder: The run's folder: a file of text is prepared in it. None: no such file is given.
        processes: How many processes prepare text (see `opt_core.data.prepare`).
        progress: Called with (bytes read, bytes in all, what is read) while text is prepared.
        note: Called with a line about what was left out; None: it is a warning.

    Raises:
        DataError: It is not what the task needs.
        TokenizerError: The tokenizer cannot be read.
    """
    if task not in get_args(Task):
        raise DataError(f"task: expected {', '.join(get_args(Task))}, received {task!r}")
    opening = _Opening(
        model_config, config, tokenizer, None if folder is None else Path(folder), processes,
        progress, note or _warn,
    )  # fmt: skip
    data, validation = Path(data), None if validation is None else Path(validation)
    for path in (data, validation):
        if path is not None and not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if task == "text":
        return opening.text(data, validation)
    if task == "classification":
        return opening.classification(data, validation)
    return opening.questions(data, validation)


@dataclass(frozen=True)
class _Opening:
    """The arguments of `open_data`, and what is done with the files of each task."""

    model_config: OPTConfig
    config: TrainConfig
    tokenizer: OPTTokenizer | str | PathLike[str] | None
    folder: Path | None
    processes: int
    progress: Callable[[int, int, str], None] | None
    note: Callable[[str], None]

    def text(self, data: Path, validation: Path | None) -> TrainingData:
        if data.is_file():
            held_out = HELD_OUT if self.config.eval_every and validation is None else 0
            data = self._prepared(data, "data", held_out)
        if validation is not None and validation.is_file():
            validation = self._prepared(validation, "data-validation", 0) / TRAIN
        if (data / TRAIN / BLOCKS_FILE).exists():
            beside = data / VALIDATION
            if validation is None and (beside / BLOCKS_FILE).exists():
                validation = beside
            data = data / TRAIN
        train = self._blocks(data)
        held_out = None if validation is None else self._blocks(validation)
        return TrainingData(train, held_out, self.model_config)

    def classification(self, data: Path, validation: Path | None) -> TrainingData:
        tokenizer, length = self._tokenizer(data), self.config.sequence_length
        texts = read_labelled_texts(data)
        labels = dict(enumerate(texts.label_names))
        model_config = self.model_config.replace(
            num_labels=len(labels), id2label=labels, problem_type="single_label_classification"
        )
        train = encode_labelled_texts(texts, tokenizer, length)
        if validation is None:
            return TrainingData(train, None, model_config)
        held_out = read_labelled_texts(validation, texts.label_names)
        return TrainingData(train, encode_labelled_texts(held_out, tokenizer, length), model_config)

    def questions(self, data: Path, validation: Path | None) -> TrainingData:
        tokenizer = self._tokenizer(data)
        train = self._question_windows(data, tokenizer)
        held_out = None if validation is None else self._question_windows(validation, tokenizer)
        return TrainingData(train, held_out, self.model_config)

    def _question_windows(self, data: Path, tokenizer: OPTTokenizer) -> Source:
        length = self.config.sequence_length
        questions = read_questions(data)
        with _naming(data):
            windows = encode_questions(questions, tokenizer, length, length // 3)
        for reason, count in windows.dropped.items():
            self.note(f"{data}: {count} questions left out: {reason}")
        return windows.examples

    def _prepared(self, file: Path, name: str, held_out: float) -> Path:
        """The folder of a file of text, prepared now if a run before has not."""
        if self.folder is None:
            raise DataError(f"{file}: expected prepared text, or a folder to prepare a file in")
        folder = self.folder / name
        if folder.exists():
            return folder
        is_new = not self.folder.exists()
        try:
            with _naming(file):
                prepare(
                    [file], folder, self._tokenizer(file),
                    DataConfig(self.config.sequence_length, held_out), self.processes,
                    self._progress_of(file),
                )  # fmt: skip
        except DataError as error:
            about_split = held_out and VALIDATION in str(error).removeprefix(str(file))
            hint = "; or name other data: validation" if about_split else ""
            raise DataError(f"{error}{hint}") from None
        finally:
            if is_new:
                with suppress(OSError):
                    self.folder.rmdir()  # where nothing came of it
        return folder

    def _progress_of(self, file: Path) -> Callable[[int, int], None] | None:
        progress = self.progress
        if progress is None:
            return None
        return lambda done, total: progress(done, total, f"preparing {file}")

    def _blocks(self, folder: Path) -> TokenBlocks:
        blocks = TokenBlocks.open(folder)
        if blocks.vocab_size > self.model_config.vocab_size:
            raise DataError(
                f"{folder}: prepared for {blocks.vocab_size} tokens, the model has "
                f"{self.model_config.vocab_size}: another tokenizer"
            )
        if blocks.sequence_length != self.config.sequence_length:
            raise DataError(
                f"{folder}: blocks of {blocks.sequence_length} tokens, sequence_length is "
                f"{self.config.sequence_length}"
            )
        return blocks

    def _tokenizer(self, file: Path) -> OPTTokenizer:
        if self.tokenizer is None:
            raise DataError(
                f"{file}: no tokenizer to read it with (a size alone has none): name one, or a "
                "folder of `opt-lm prepare`"
            )
        if isinstance(self.tokenizer, str | PathLike):
            return OPTTokenizer.from_pretrained(self.tokenizer)
        return as_tokenizer(self.tokenizer)


@contextmanager
def _naming(file: Path) -> Generator[None]:
    """Puts the file's name before what is wrong with its data."""
    try:
        yield
    except DataError as error:
        is_named = str(error).startswith(str(file))
        raise DataError(str(error) if is_named else f"{file}: {error}") from None


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=5)  # where `open_data` was called
