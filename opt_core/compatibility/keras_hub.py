"""KerasHub's names for what is here already: presets, samplers, texts in place of ids."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.compatibility.datasets import stack_rows
from opt_core.errors import ConfigError, InputError

PRESETS: Mapping[str, str] = {
    "opt_125m_en": "facebook/opt-125m",
    "opt_1.3b_en": "facebook/opt-1.3b",
    "opt_2.7b_en": "facebook/opt-2.7b",
    "opt_6.7b_en": "facebook/opt-6.7b",
}
"""KerasHub's presets -> the repositories whose weights they are."""

SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False, "num_beams": 1},
    "beam": {"do_sample": False, "num_beams": 5},
    "random": {"do_sample": True, "num_beams": 1, "top_k": 0},
    "top_k": {"do_sample": True, "num_beams": 1, "top_k": 5},
    "top_p": {"do_sample": True, "num_beams": 1, "top_k": 0, "top_p": 0.1},
}
"""KerasHub's samplers, with its defaults -> settings of generation."""


def sampler_settings(sampler: Any) -> Mapping[str, Any]:
    """Settings of generation that stand for a sampler.

    Raises:
        ConfigError: It is not one of `SAMPLERS`.
    """
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ConfigError(
            f"sampler: expected one of {', '.join(SAMPLERS)}, received {sampler!r}; "
            "or set model.generation_config"
        )
    return SAMPLERS[sampler]


def texts_of(values: Any) -> list[str] | None:
    """The texts of a list, a tuple or an array of them; None for anything else."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = cast(list[Any], values.tolist())
    if not isinstance(values, list | tuple) or not values:
        return None
    found = cast(list[Any], list(values))  # pyright: ignore[reportUnknownArgumentType]
    found = [value.decode() if isinstance(value, bytes) else value for value in found]
    return found if all(isinstance(text, str) for text in found) else None


def encode_texts(
    tokenizer: Any,
    texts: Iterable[str],
    pad_token_id: int | None,
    longest: int,
    end: int | None = None,
    padding_side: str = "right",
) -> dict[str, NDArray[np.int32]]:
    """Ids of texts, each cut to a length and padded to that of the longest.

    Args:
        tokenizer: Ours or that of `transformers`.
        texts: What to encode.
        pad_token_id: The model's.
        longest: Most tokens of a text.
        end: Id to put behind each text, as KerasHub's preprocessor does for training.
        padding_side: "right" to train, "left" to generate.

    Raises:
        InputError: There is no tokenizer.
    """
    if tokenizer is None:
        raise InputError("texts need a tokenizer: set model.preprocessor, or load by from_preset")
    rows: list[dict[str, NDArray[Any]]] = []
    for text in texts:
        ids = np.ravel(tokenizer(text)["input_ids"])
        ids = (ids if end is None else np.append(ids, end))[:longest]
        rows.append({"input_ids": ids, "attention_mask": np.ones(len(ids), np.int32)})
    return stack_rows(rows, pad_token_id, padding_side)
