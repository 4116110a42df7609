"""The layer for code written for `transformers`: what TensorFlow has to do for it."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras


def name_inputs(
    call: Callable[..., Any], first: Any, others: tuple[Any, ...], named: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a model's call by name: Keras takes positional ones for tensors.

    Args:
        call: The model's `call`.
        first: Its first argument: ids, or, as Keras and `transformers` have it, several inputs in a
            mapping, or in a tuple or list in the order of the parameters.
        others: Its other positional arguments.
        named: Arguments by name.
    """
    if isinstance(first, Mapping):
        values = {**first, **named}
    else:
        if isinstance(first, tuple | list) and first and len(getattr(first[0], "shape", ())) == 2:
            first, *others = first
        values = {**inspect.signature(call).bind_partial(first, *others).arguments, **named}
    if any(isinstance(value, keras.KerasTensor) for value in values.values()):
        values.setdefault("use_cache", False)  # a functional model knows its outputs beforehand
    return values
