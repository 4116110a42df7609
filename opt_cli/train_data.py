"""What `opt-lm train` is given to train on, opened."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opt_core.errors import DataError

if TYPE_CHECKING:
    from opt_core import OPTConfig, TrainConfig


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
) -> Opened:
    """Opens what to train on.

    Args:
        task: "text", "classification" or "qa".
        data: What to train on.
        validation: What to validate on; for text, the part of a prepared folder by default.
        model: Folder of the model, with its tokenizer.
        model_config: The model's configuration.
        config: How to train.

    Raises:
        DataError: It is not what the task needs.
    """
    from opt_core.data_blocks import BLOCKS_FILE, TokenBlocks

    if (data / "train" / BLOCKS_FILE).exists():
        held_out = data / "validation"
        if validation is None and (held_out / BLOCKS_FILE).exists():
            validation = held_out
        data = data / "train"
    blocks = [None if path is None else TokenBlocks.open(path) for path in (data, validation)]
    for one in blocks:
        if one is not None and one.vocab_size > model_config.vocab_size:
            raise DataError(
                f"{data}: prepared for {one.vocab_size} tokens, the model has "
                f"{model_config.vocab_size}: another tokenizer"
            )
        if one is not None and one.sequence_length != config.sequence_length:
            raise DataError(
                f"{data}: blocks of {one.sequence_length} tokens, --sequence-length is "
                f"{config.sequence_length}"
            )
    return Opened(blocks[0], blocks[1], model_config)
