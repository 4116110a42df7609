"""Inputs by name: what `transformers`, Keras and KerasHub pass in dicts, tuples or by place."""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import tensorflow as tf

from opt_core.compatibility import keras_hub
from opt_core.compatibility.calls import OPTIONS
from opt_core.errors import ArgumentError


def name_inputs(
    model: Any,
    first: Any,
    others: tuple[Any, ...],
    named: Mapping[str, Any],
    signature: inspect.Signature | None = None,
) -> dict[str, Any]:
    """The arguments of a model's call by name: Keras takes positional ones for tensors.

    Args:
        model: The model.
        first: Its first argument: ids, or, as Keras and `transformers` have it, several inputs in a
            mapping, or in a tuple or list in the order of the parameters.
        others: Its other positional arguments.
        named: Arguments by name.
        signature: Of the `call`; None: the model's.

    Raises:
        ArgumentError: The third input may be one of two, and nothing tells which.
    """
    explicit, signature = named, signature or _signature(model)
    if next(iter(signature.parameters)) != "input_ids":  # a call of the user's own
        values = explicit = {**signature.bind_partial(first, *others).arguments, **named}
    elif isinstance(first, Mapping):
        renamed = {keras_hub.INPUTS.get(str(name), name): value for name, value in first.items()}
        values = explicit = {**renamed, **named}
    else:
        if isinstance(first, tuple | list) and first and len(getattr(first[0], "shape", ())) == 2:
            first, others = first[0], tuple(first[1:])
        if others and _is_cache(others[0]):  # transformers' order
            filled = (*others, *(None,) * (5 - len(others)))
            past, mask, places, heads, embeds, *rest = filled
            others = (mask, places, embeds, past, *rest[:1])
            named = {"head_mask": heads, **named}
        elif len(others) > 1 and others[0] is None and others[1] is not None:
            raise ArgumentError(
                "the third input, without a second, is attention_mask in transformers and "
                "position_ids here; pass it by name"
            )
        values = {**signature.bind_partial(first, *others).arguments, **named}
    if any(isinstance(value, keras.KerasTensor) for value in values.values()):
        values.setdefault("use_cache", False)  # a functional model knows its outputs beforehand
    elif explicit.get("past_key_values", False) is None and values.get("use_cache") is None:
        # Whoever passes what is None so far goes on with what is returned, traced or not.
        values["use_cache"] = model.config.use_cache and not values.get("training")
    return {k: _Covered(v) if k in OPTIONS and tf.is_tensor(v) else v for k, v in values.items()}


def _signature(model: Any) -> inspect.Signature:
    """Of a model's `call`; of one that names nothing (`*args`) that of the class it extends."""
    calls = (vars(kind)["call"] for kind in type(model).__mro__ if "call" in vars(kind))
    return next(
        signature
        for signature in map(_without_self, calls)
        if all(p.kind is not p.VAR_POSITIONAL for p in signature.parameters.values())
    )


def _without_self(call: Callable[..., Any]) -> inspect.Signature:
    signature = inspect.signature(call)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


class _Covered:
    """A tensor among a call's options, which Keras refuses to see beside what is none."""

    def __init__(self, tensor: Any):
        self.tensor = tensor


def uncovering(call: Callable[..., Any], extended: Any) -> Callable[..., Any]:
    """A `call` that finds the tensors again that `name_inputs` covered, and takes several at once.

    Args:
        call: As a class has it.
        extended: That of the class it extends, whose parameters Keras is shown where a call names
            none: it refuses tensors and others in one `**kwargs`.
    """
    signature = _without_self(call)

    @functools.wraps(call)
    def run(self: Any, *args: Any, **options: Any) -> Any:
        if args and isinstance(args[0], Mapping | tuple | list):  # of `super().call(inputs)`
            args, options = (), name_inputs(self, args[0], args[1:], options, signature)
        found = {k: v.tensor if isinstance(v, _Covered) else v for k, v in options.items()}
        return call(self, *args, **found)

    if any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        vars(run)["__signature__"] = inspect.signature(extended)
    return run


def _is_cache(value: Any) -> bool:
    """Whether it is a cache, or keys and values, and no mask."""
    is_pairs = isinstance(value, tuple | list) and value and isinstance(value[0], tuple | list)
    return hasattr(value, "keys") or bool(is_pairs and hasattr(value[0][0], "shape"))
