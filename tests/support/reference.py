"""The second reference: live `transformers` models that hold the oracle's random weights.

`transformers` and torch are imported when a model is asked for; without them the test is skipped.
"""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from opt_core.config import OPTConfig
from opt_core.params import Head
from tests.support.oracle import random_params
from tests.support.oracle_generation import Settings

HEADS: dict[str, Head] = {
    "OPTForCausalLM": "causal_lm",
    "OPTForSequenceClassification": "sequence_classification",
    "OPTForQuestionAnswering": "question_answering",
}


def reference(
    config: OPTConfig, kind: str = "OPTForCausalLM", attention: str = "sdpa", seed: int = 0
) -> Any:
    """Makes a `transformers` model in float64, not training.

    Args:
        config: The model's configuration.
        kind: Name of the class; one of `HEADS`.
        attention: "sdpa", or "eager" for attention weights (its softmax is always in float32).
        seed: As in `random_params`.
    """
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    values = {k: v for k, v in config.to_dict().items() if k not in ("model_type", "torch_dtype")}
    theirs = transformers.OPTConfig(**values, attn_implementation=attention)
    model = getattr(transformers, kind)(theirs).double().eval()
    weights = {k: torch.tensor(v) for k, v in random_params(config, HEADS[kind], seed).items()}
    if kind == "OPTForCausalLM" and config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.decoder.embed_tokens.weight"]
    model.load_state_dict(weights)
    return model.requires_grad_(False)


def tensors(arrays: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """The same keyword arguments as torch tensors."""
    torch = pytest.importorskip("torch")
    return {name: torch.tensor(array) for name, array in arrays.items()}


def options(settings: Settings) -> dict[str, Any]:
    """The oracle's settings as keyword arguments of `transformers`' generate."""
    values = asdict(settings)
    values["eos_token_id"] = values.pop("eos_token_ids")
    del values["max_new_tokens"]  # each call has its own
    values = {k: list(v) if isinstance(v, tuple | range) else v for k, v in values.items()}
    # An empty list, or a least length of 0, is a filter to transformers too; None is not.
    return {k: v or None for k, v in values.items()} | {"pad_token_id": 1}


def make_prompts(config: OPTConfig, batch: int, length: int, seed: int = 0) -> NDArray[np.int64]:
    """Random token ids [B, T] that start with 2 and are never the pad token."""
    ids = np.random.default_rng(seed).integers(3, config.vocab_size, (batch, length))
    ids[:, 0] = 2
    return ids


def make_mask(side: str, lengths: list[int]) -> NDArray[np.int64]:
    """An attention mask [B, T] for rows of these lengths, padded on the "left" or "right"."""
    mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
    return (mask[:, ::-1] if side == "left" else mask).astype(np.int64)
