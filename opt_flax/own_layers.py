"""Layers that a class of a user's own adds to a model, in and out of files."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from opt_core.checkpoints.load import canonical_name
from opt_core.compatibility import linen
from opt_core.compatibility.subclasses import is_own_class
from opt_core.errors import InputError
from opt_core.params import param_specs
from opt_flax import checkpoint


class OwnLayers:
    """Finds and fills what is none of OPT's parameters, for `opt_core.compatibility.subclasses`."""

    def _own_tensors(self) -> dict[str, Array]:
        return {name: variable.get_value() for name, variable in self._own_variables().items()}

    def _own_array(self, tensor: Array) -> NDArray[Any]:
        return checkpoint.as_array(tensor)

    def _build_own(self) -> None:
        """Nothing: NNX' layers are complete when they are made."""

    def _put_own(self: Any, values: Mapping[str, NDArray[Any]]) -> None:
        for name, variable in self._own_variables().items():
            value = values.get(str(canonical_name(name)), variable.get_value())
            is_float = jnp.issubdtype(variable.get_value().dtype, jnp.floating)
            variable.set_value(jnp.asarray(value, self.dtype if is_float else None))

    def _add_own(self: Any, tree: dict[str, Any], read: Callable[[Any], Any]) -> dict[str, Any]:
        """A tree of parameters with those of the user's layers, which keep their names."""
        for path, variable in self._trained().items():
            linen.put(tree, path, read(variable))
        return tree

    def _split_own(self: Any, params: Any) -> tuple[Any, list[tuple[nnx.Variable[Any], Any]]]:
        """A tree of parameters without those of the user's layers, and what becomes of these.

        Raises:
            InputError: One of them is missing, or has another shape.
        """
        own = self._trained()
        rest, values = linen.take(params, list(own))
        for path, value in values.items():
            if np.shape(value) != tuple(own[path].shape):
                raise InputError(
                    f"params: {'/'.join(path)}: expected shape {tuple(own[path].shape)}, received "
                    f"{np.shape(value)}"
                )
        return rest, [(own[path], value) for path, value in values.items()]

    def _trained(self: Any) -> dict[tuple[str, ...], nnx.Variable[Any]]:
        """Parameters of a user's layers, by paths."""
        if not is_own_class(type(self)):
            return {}
        own = self._own_variables().items()
        return {tuple(n.split(".")): var for n, var in own if isinstance(var, nnx.Param)}

    def _own_variables(self: Any) -> dict[str, nnx.Variable[Any]]:
        specs = param_specs(self.config, self.head)
        known = {checkpoint.parameter_path(self, spec)[0][:-1] for spec in specs}
        found: dict[str, nnx.Variable[Any]] = {}
        for path, node in nnx.iter_graph(self):
            within = any(path[:end] in known for end in range(1, len(path) + 1))
            if isinstance(node, nnx.Param | nnx.BatchStat) and not within:
                found[".".join(map(str, path))] = node
        return found
