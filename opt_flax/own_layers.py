"""Layers that a class of a user's own adds to a model, in and out of files."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array
from numpy.typing import NDArray

from opt_core.checkpoints.load import canonical_name
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

    def _own_variables(self: Any) -> dict[str, nnx.Variable[Any]]:
        specs = param_specs(self.config, self.head)
        known = {checkpoint.parameter_path(self, spec)[0][:-1] for spec in specs}
        found: dict[str, nnx.Variable[Any]] = {}
        for path, node in nnx.iter_graph(self):
            within = any(path[:end] in known for end in range(1, len(path) + 1))
            if isinstance(node, nnx.Param | nnx.BatchStat) and not within:
                found[".".join(map(str, path))] = node
        return found
