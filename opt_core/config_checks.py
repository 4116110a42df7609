"""Checks of a configuration's fields: their types, their ranges, and how they go together."""

from collections.abc import Mapping
from types import UnionType
from typing import Any, get_args, get_origin

from opt_core.errors import ConfigError

ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish")
DTYPES = ("float32", "float16", "bfloat16", "float64")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def check_types(config: Any, hints: Mapping[str, Any]) -> None:
    """Checks the types of fields.

    Args:
        config: The configuration.
        hints: Name -> type of each field.

    Raises:
        ConfigError: A value is of another type.
    """
    for name, hint in hints.items():
        value = getattr(config, name)
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds: list[type[Any]] = [get_origin(option) or option for option in options]
        if float in kinds:
            kinds.append(int)
        if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{name}: expected {kinds[0].__name__}, received {value!r}")


def check_ranges(config: Any) -> None:
    """Checks the values of fields, of the right types, and how they go together.

    Raises:
        ConfigError: A value is out of range or contradicts another one.
    """
    for name in (
        "vocab_size", "hidden_size", "ffn_dim", "max_position_embeddings", "embed_dim",
        "num_attention_heads", "num_hidden_layers", "num_labels",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, received {getattr(config, name)}")
    for name in ("dropout", "attention_dropout", "layerdrop"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name}: expected 0 <= p < 1, received {getattr(config, name)}")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"hidden_size={config.hidden_size} does not divide into "
            f"num_attention_heads={config.num_attention_heads}"
        )
    if not 0 <= config.init_std < float("inf"):
        raise ConfigError(f"init_std: expected a finite number >= 0, received {config.init_std}")
    for name, allowed in (
        ("activation_function", ACTIVATIONS), ("problem_type", PROBLEM_TYPES), ("dtype", DTYPES),
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, received {value!r}")
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        raise ConfigError(
            f"pad_token_id={config.pad_token_id} is outside the vocabulary "
            f"(vocab_size={config.vocab_size})"
        )
    if config.id2label is not None and set(config.id2label) != set(range(config.num_labels)):
        raise ConfigError(
            f"id2label: expected keys 0..{config.num_labels - 1} (num_labels), "
            f"received {sorted(config.id2label)}"
        )
