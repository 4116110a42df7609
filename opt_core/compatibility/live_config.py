"""Configurations of live models: they can be set, but parameters do not follow."""

from collections.abc import Callable, Iterable
from typing import Any

from opt_core.config import STRUCTURE, OPTConfig
from opt_core.errors import ConfigError
from opt_core.params import Head

Shapes = tuple[tuple[Any, ...], int]


def shapes_of(config: OPTConfig) -> Shapes:
    """Fields that a model of a configuration keeps, to see later whether they still are its own."""
    return config.structure, config.num_labels


def layers_follow(config: OPTConfig, shapes: Shapes, layers: Callable[[], Iterable[Any]]) -> bool:
    """Whether nothing but the number of layers was changed, and there are that many now.

    Args:
        config: The configuration as it is now.
        shapes: What the model was made with.
        layers: Gives the decoder's layers.
    """
    if config.structure is shapes[0] or config.structure == shapes[0]:
        return False
    pairs = zip(STRUCTURE, shapes[0], config.structure, strict=True)
    changed = [name for name, old, new in pairs if old != new]
    return changed == ["num_hidden_layers"] and len([*layers()]) == config.num_hidden_layers


def check_shapes(config: OPTConfig, shapes: Shapes, head: Head) -> None:
    """Compares a live model's configuration with the parameters.

    Args:
        config: The configuration as it is now.
        shapes: What the model was made with.
        head: The model's head.

    Raises:
        ConfigError: A field was changed that decides their shapes.
    """
    structure, labels = shapes
    if config.structure is not structure and config.structure != structure:
        changed = zip(STRUCTURE, structure, config.structure, strict=True)
        _refuse(*next(change for change in changed if change[1] != change[2]))
    if head == "sequence_classification" and config.num_labels != labels:
        _refuse("num_labels", labels, config.num_labels)


def _refuse(name: str, old: Any, new: Any) -> None:
    raise ConfigError(
        f"{name}={new!r} was set on a model made with {old!r}, whose parameters cannot follow; "
        f"set it back, or make a new model: from_pretrained(..., {name}={new!r}, "
        "ignore_mismatched_sizes=True)"
    )
