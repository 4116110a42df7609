"""JAX and Flax behind the interface of `tests.support.backends`."""

import importlib
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax._src.interpreters import mlir

from opt_core.params import Head, param_specs
from tests.support.backends import Backend
from tests.support.oracle import Array

jax.config.update("jax_default_matmul_precision", "highest")
if hasattr(mlir, "make_ir_context"):  # JAX does not document it
    # One context for all that is compiled: loading every dialect into a new one takes a fifth of
    # the time of compiling an operation, and there are thousands of them.
    mlir.make_ir_context = lru_cache(maxsize=None)(mlir.make_ir_context)


class FlaxBackend(Backend):
    """Flax NNX."""

    def array(self, value: Any) -> jax.Array:
        return jnp.asarray(value)

    def differentiate(self, function: Any, *arrays: Array) -> tuple[Array, list[Array]]:
        with jax.enable_x64(True):
            every = tuple(range(len(arrays)))
            value, gradients = jax.value_and_grad(function, every)(*map(jnp.asarray, arrays))
        return np.asarray(value), [np.asarray(gradient) for gradient in gradients]

    def random(self, seed: int) -> Any:
        return jax.random.key(seed)

    def gradients(self, model: Any, head: Head, **inputs: Any) -> dict[str, Array]:
        gradients = nnx.grad(lambda m: m(**inputs).loss)(model)
        holder = nnx.clone(model)
        nnx.update(holder, gradients)
        checkpoint = importlib.import_module("opt_flax.checkpoint")
        specs = param_specs(model.config, head)
        return {s.name: self.numpy(checkpoint.get_parameter(holder, s)) for s in specs}
