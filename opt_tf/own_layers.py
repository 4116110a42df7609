"""Layers that a class of a user's own adds to a model, in and out of files."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from opt_core.checkpoints.load import canonical_name
from opt_core.dialects import KERAS
from opt_core.params import param_specs
from opt_tf import _private


class OwnLayers:
    """Finds and fills what is none of OPT's parameters, for `opt_core.compatibility.subclasses`."""

    def _own_tensors(self: Any) -> dict[str, keras.Variable]:
        owners = [KERAS.owner(self, spec)[0] for spec in param_specs(self.config, self.head)]
        known = {id(part) for owner in owners for part in _private.sublayers(owner)}
        return dict(_variables(self, "", known))

    def _own_array(self, tensor: Any) -> NDArray[Any]:
        return np.asarray(tensor)

    def _build_own(self: Any) -> None:
        if not all(layer.built for layer in _private.sublayers(self)):
            self(self.dummy_inputs)

    def _put_own(self: Any, values: Mapping[str, NDArray[Any]]) -> None:
        for name, variable in self._own_tensors().items():
            array = values.get(str(canonical_name(name)))
            if array is not None:
                variable.assign(tf.cast(tf.constant(array), variable.dtype))


def _variables(
    layer: keras.layers.Layer, path: str, known: set[int]
) -> Iterator[tuple[str, keras.Variable]]:
    """A layer's variables and those within it, by attributes, and by numbers in lists.

    Args:
        layer: The layer.
        path: Where it is, with a dot behind, or nothing.
        known: Layers to leave out, by their identities; those that were seen are added.
    """
    known.add(id(layer))
    within = list(_parts(layer))
    theirs = {id(variable) for _, part in within for variable in part.weights}
    for variable in layer.weights:
        if id(variable) not in theirs:
            yield path + variable.name, variable
    for name, part in within:
        if id(part) not in known:
            yield from _variables(part, f"{path}{name}.", known)


def _parts(layer: keras.layers.Layer) -> Iterator[tuple[str, keras.layers.Layer]]:
    attributes = sorted(vars(layer).items(), key=lambda item: item[0].startswith("_"))
    for name, value in attributes:  # Keras' own lists, which have every layer again, come last
        if isinstance(value, keras.layers.Layer):
            yield name, value
        elif isinstance(value, list | tuple):
            layers = (part for part in value if isinstance(part, keras.layers.Layer))
            parts = (part for part in layers if not isinstance(part, keras.layers.InputLayer))
            yield from ((f"{name.lstrip('_')}.{i}", part) for i, part in enumerate(parts))
