"""KerasHub's names for what is here already: presets, samplers, texts in place of ids."""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.compatibility.datasets import stack_rows
from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError, ConfigError, InputError
from opt_core.generation.config import as_ids

PRESETS: Mapping[str, str] = {
    "opt_125m_en": "facebook/opt-125m",
    "opt_1.3b_en": "facebook/opt-1.3b",
    "opt_2.7b_en": "facebook/opt-2.7b",
    "opt_6.7b_en": "facebook/opt-6.7b",
}
"""KerasHub's presets -> the repositories whose weights they are."""

INPUTS: Mapping[str, str] = {"token_ids": "input_ids", "padding_mask": "attention_mask"}
"""KerasHub's names of a model's inputs -> ours."""

FIELDS: Mapping[str, str] = {
    "vocabulary_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "hidden_dim": "hidden_size",
    "intermediate_dim": "ffn_dim",
    "dropout": "dropout",
    "max_sequence_length": "max_position_embeddings",
}
"""KerasHub's arguments of a backbone -> fields of the configuration."""

SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "greedy": {"do_sample": False, "num_beams": 1},
    "beam": {"do_sample": False, "num_beams": 5},
    "random": {"do_sample": True, "num_beams": 1, "top_k": 0},
    "top_k": {"do_sample": True, "num_beams": 1, "top_k": 5},
    "top_p": {"do_sample": True, "num_beams": 1, "top_k": 0, "top_p": 0.1},
}
"""KerasHub's samplers, with its defaults -> settings of generation."""


REFUSED: Mapping[str, str] = {
    "call_with_cache": "call the model with past_key_values=",
    "generate_step": "use generate",
    "generate_function": "generate keeps its programs itself",
    "make_generate_function": "generate keeps its programs itself",
    "save_task_weights": "use save_weights, or save_pretrained",
    "load_task_weights": "use load_weights, or from_pretrained",
    "has_task_weights": "the head is the token embedding, or lm_head",
    "preprocess_samples": "call model.preprocessor",
}
"""KerasHub's methods of a task that there are not, and what to use."""

_SAMPLER_CLASSES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "GreedySampler": ("greedy", {}),
    "BeamSampler": ("beam", {"num_beams": "num_beams"}),
    "RandomSampler": ("random", {"temperature": "temperature"}),
    "TopKSampler": ("top_k", {"k": "top_k", "temperature": "temperature"}),
    "TopPSampler": ("top_p", {"p": "top_p", "k": "top_k", "temperature": "temperature"}),
}
"""KerasHub's classes of samplers: which one, and its attributes -> settings of generation."""


def find_config(config: Any, backbone: Any, options: dict[str, Any]) -> Any:
    """The configuration that a model is made of, which KerasHub gives otherwise.

    Args:
        config: The configuration, or None.
        backbone: A model in its place, or None.
        options: Arguments of the constructor: those of KerasHub's backbones are taken out.

    Raises:
        ArgumentError: There is none.
    """
    if config is None and backbone is not None:
        return backbone.config
    held = {own: options.pop(name) for name, own in FIELDS.items() if name in options}
    if config is None and not held:
        raise ArgumentError("config: expected an OPTConfig, received none")
    return OPTConfig(**{"word_embed_proj_dim": held.get("hidden_size"), **held}) if held else config


def renamed(inputs: Any) -> Any:
    """Inputs by our names, where they are a mapping."""
    if not isinstance(inputs, Mapping):
        return inputs
    given = cast(Mapping[str, Any], inputs)
    return {INPUTS.get(name, name): value for name, value in given.items()}


def are_keras_hubs(inputs: Any) -> bool:
    """Whether inputs have KerasHub's names: labels beside them are the next tokens already."""
    return isinstance(inputs, Mapping) and "token_ids" in inputs


def encode_for_fit(
    preprocessor: Any, texts: list[str], config: OPTConfig
) -> tuple[dict[str, NDArray[Any]], NDArray[Any], NDArray[Any]]:
    """Inputs of texts, labels (B, T) for a loss that does not shift them, and the labels' weights.

    Args:
        preprocessor: A tokenizer, or an `OPTCausalLMPreprocessor`.
        texts: What to encode.
        config: The model's configuration.

    Raises:
        InputError: There is no tokenizer.
    """
    if hasattr(preprocessor, "sequence_length"):
        inputs, labels, weights = preprocessor(texts)
        return renamed(inputs), labels, weights
    longest, end = config.max_position_embeddings, next(iter(as_ids(config.eos_token_id)), None)
    inputs = encode_texts(preprocessor, texts, config.pad_token_id, longest, end)
    labels, weights = (np.pad(x[:, 1:], ((0, 0), (0, 1))) for x in inputs.values())
    return inputs, labels, weights


def left_padded(ids: Any, mask: Any) -> tuple[NDArray[Any], NDArray[Any]]:
    """Prompts (B, L) and mask with padding on the left, of rows (B, W) with it on the right."""
    values: list[Any] = [np.asarray(ids), np.asarray(mask) != 0]
    rows = [row[kept] for row, kept in zip(*values, strict=True)]
    found = stack_rows([{"input_ids": row} for row in rows], 0, "left")
    return found["input_ids"], found["attention_mask"]


def right_padded(
    ids: Any, width: int, lengths: NDArray[Any], ends: Iterable[int]
) -> dict[str, NDArray[Any]]:
    """The result of KerasHub's `generate`: rows (B, W) with padding on the right, and their mask.

    Args:
        ids: (B, L + new), what was generated behind prompts that are padded on the left.
        width: Tokens W of a row.
        lengths: (B,) tokens of the prompts.
        ends: Ids that end a row.
    """
    ids, longest, stops = np.asarray(ids), int(lengths.max()), [*ends]
    found = np.zeros((len(ids), width), np.int32)
    mask = np.zeros((len(ids), width), bool)
    for i, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        kept = row[longest - length :][:width]
        last = np.flatnonzero(np.isin(kept[length:], stops))
        count = length + last[0] + 1 if len(last) else len(kept)
        found[i, :count], mask[i, :count] = kept[:count], True
    return {"token_ids": found, "padding_mask": mask}


def sampler_settings(sampler: Any) -> Mapping[str, Any]:
    """Settings of generation that stand for a sampler.

    Raises:
        ConfigError: It is not one of `SAMPLERS`.
    """
    kind = type(sampler).__name__
    if kind in _SAMPLER_CLASSES:
        name, attributes = _SAMPLER_CLASSES[kind]
        held = {ours: getattr(sampler, own, None) for own, ours in attributes.items()}
        return {**SAMPLERS[name], **{k: v for k, v in held.items() if v is not None}}
    if not isinstance(sampler, str) or sampler not in SAMPLERS:
        raise ConfigError(
            f"sampler: expected one of {', '.join(SAMPLERS)}, received {sampler!r}; "
            "or set model.generation_config"
        )
    return SAMPLERS[sampler]


def texts_of(values: Any) -> list[str] | None:
    """The texts of a list, a tuple, an array or a tensor of them; None for anything else."""
    if getattr(getattr(values, "dtype", None), "name", "") == "string":  # TensorFlow's
        values = values.numpy()
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
    tokenizer = tokenizer.tokenizer if hasattr(tokenizer, "sequence_length") else tokenizer
    for text in texts:
        ids = np.ravel(tokenizer(text)["input_ids"])
        ids = (ids if end is None else np.append(ids, end))[:longest]
        rows.append({"input_ids": ids, "attention_mask": np.ones(len(ids), np.int32)})
    return stack_rows(rows, pad_token_id, padding_side)
