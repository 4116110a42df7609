"""Classes of a user's own: how `from_pretrained` makes them, and the layers that they add."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.load import canonical_name, shorten
from opt_core.checkpoints.plan import LoadPlan, left_aside
from opt_core.checkpoints.safetensors_format import PendingTensor
from opt_core.checkpoints.wrappers import is_beside_model
from opt_core.compatibility.notices import notice
from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError, MismatchError

_LIBRARIES = ("opt_core", "opt_torch", "opt_tf", "opt_flax", "torch", "keras", "flax")


def make_model(cls: Any, config: OPTConfig, **options: Any) -> Any:
    """A model whose weights are to be replaced.

    A class whose constructor takes the configuration alone, as is usual with `transformers`, draws
    weights of its own first.

    Args:
        cls: The model's class.
        config: Its configuration.
        **options: Arguments of this library's constructors: `seed`, `attn_implementation`, ...

    Raises:
        ArgumentError: The constructor does not take an option that is needed.
    """
    parameters = inspect.signature(cls.__init__).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or "seed" in parameters:
        return cls(config, **options)
    wanted = {k: v for k, v in options.items() if k not in ("seed", *parameters) and v}
    name = wanted.pop("attn_implementation", None)
    if wanted:
        raise ArgumentError(
            f"{cls.__name__}.__init__ takes no {next(iter(wanted))}=; write "
            "def __init__(self, config, **options) and super().__init__(config, **options)"
        )
    if name is not None:
        config = config.copy()
        config.attn_implementation = name
    return cls(config, **{k: v for k, v in options.items() if k in parameters})


_PARTS = ("model", "decoder", "lm_head", "score", "qa_outputs")
"""Attributes that hold OPT's own parameters."""


def is_own_class(cls: Any) -> bool:
    """Whether a model's class is a caller's, and not one of this library's."""
    return any(map(is_own, cls.__mro__))


def is_own(kind: type) -> bool:
    """Whether one of the classes that a model's extends is a caller's model."""
    is_model = hasattr(kind, "from_pretrained")
    return is_model and kind.__module__.partition(".")[0] not in _LIBRARIES


def warn_of_own_layers(model: Any) -> None:
    """Names layers that were put on a model of this library's classes: no file of theirs has them.

    Args:
        model: The model.
    """
    if is_own_class(type(model)):
        return
    own = [name for name in model._own_tensors() if name.partition(".")[0] not in _PARTS]
    if own:
        names = shorten(own, 4)
        notice(
            f"{type(model).__name__}: layers of its own are not written, only OPT's: {names}; make "
            "them in the __init__ of a class of yours that extends it, or keep them in another file"
        )


def own_values(model: Any, given: Mapping[str, Any] | None = None) -> list[PendingTensor]:
    """The tensors of the layers that a caller's class adds, to be written behind OPT's.

    Args:
        model: The model.
        given: A `state_dict` whose values are to be written in place of the model's, or None.
    """

    def pending(name: str, tensor: Any) -> PendingTensor:
        array: NDArray[Any] = np.asarray(model._own_array(tensor), order="C")
        return PendingTensor(name, array.shape, array.dtype, lambda: array)

    held = {canonical_name(name): value for name, value in (given or {}).items()}
    return [pending(name, held.get(name, old)) for name, old in _own_tensors(model).items()]


def read_own_values(model: Any, plan: LoadPlan, where: Path) -> list[str]:
    """Gives the layers that a caller's class adds the values of the checkpoint.

    Args:
        model: The model, its other parameters in place.
        plan: What the checkpoint holds.
        where: The checkpoint, for messages.

    Returns:
        Names of those that it has no values for.

    Raises:
        MismatchError: Some of them have another shape there, or OPT's modules have more there.
    """
    if not is_own_class(type(model)):
        return []
    if plan.own:
        model._build_own()
    expected, found = _own_tensors(model), dict[str, NDArray[Any]]()
    for name in expected.keys() & plan.own.keys():
        shape, stored = tuple(expected[name].shape), plan.own[name]
        if stored.shape != shape:
            raise MismatchError(
                f"{where}: {name}: {type(model).__name__} expects {list(shape)}, received "
                f"{list(stored.shape)}"
            )
        found[name] = stored.read()
    rest = [name for name in plan.own if name not in expected and name not in plan.aside]
    if inner := [name for name in rest if not is_beside_model(name) and name in plan.own]:
        raise MismatchError(
            f"{where}: {inner[0]}: neither OPT nor {type(model).__name__} has such a parameter"
        )
    if rest:
        notice(left_aside(where, rest))
    model._put_own(found)
    fresh = [name for name in expected if name not in found]
    if fresh:
        notice(
            f"{where}: no {shorten(fresh, 4)} in this checkpoint; layers of {type(model).__name__} "
            "are freshly initialised and need training"
        )
    return fresh


def _own_tensors(model: Any) -> dict[str, Any]:
    """Tensors of a caller's layers by canonical names."""
    if not is_own_class(type(model)):
        return {}
    named = {canonical_name(name): value for name, value in model._own_tensors().items()}
    return {name: value for name, value in named.items() if name is not None}
