"""Data for training: read, cleaned, tokenised, in blocks and in batches."""

from typing import TYPE_CHECKING

from opt_core.lazy_names import lazy_names

if TYPE_CHECKING:
    from opt_core.data.batches import Batches
    from opt_core.data.classification import (
        LabelledTexts,
        encode_labelled_texts,
        read_labelled_texts,
    )
    from opt_core.data.cleaning import Cleaning
    from opt_core.data.open import TrainingData, open_data
    from opt_core.data.preparation import DataConfig, DataReport, prepare
    from opt_core.data.readers import read_text
    from opt_core.data.squad import Question, Windows, encode_questions, read_questions
    from opt_core.data.token_blocks import TokenBlocks, write_blocks

__all__ = [
    "Batches",
    "Cleaning",
    "DataConfig",
    "DataReport",
    "LabelledTexts",
    "Question",
    "TokenBlocks",
    "TrainingData",
    "Windows",
    "encode_labelled_texts",
    "encode_questions",
    "open_data",
    "prepare",
    "read_labelled_texts",
    "read_questions",
    "read_text",
    "write_blocks",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "batches": ["Batches"],
        "classification": ["LabelledTexts", "encode_labelled_texts", "read_labelled_texts"],
        "cleaning": ["Cleaning"],
        "open": ["TrainingData", "open_data"],
        "preparation": ["DataConfig", "DataReport", "prepare"],
        "readers": ["read_text"],
        "squad": ["Question", "Windows", "encode_questions", "read_questions"],
        "token_blocks": ["TokenBlocks", "write_blocks"],
    },
)
