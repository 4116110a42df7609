"""Parameters as `transformers`' Flax models have them: fresh, in another type, turned round."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from opt_core.config import OPTConfig
from opt_core.params import ParamSpec


def draw_values(config: OPTConfig, rng: Array) -> Callable[[ParamSpec], Array]:
    """Fresh values of parameters, drawn one after another."""
    keys = iter(range(2**31))

    def draw(spec: ParamSpec) -> Array:
        if spec.name.endswith(".bias"):
            return jnp.zeros(spec.shape)
        if spec.kind == "norm":
            return jnp.ones(spec.shape)
        key = jax.random.fold_in(rng, next(keys))
        values = config.init_std * jax.random.normal(key, spec.shape)
        if spec.name.endswith("embed_tokens.weight") and config.pad_token_id is not None:
            values = values.at[config.pad_token_id].set(0)
        return values

    return draw


def cast_tree(params: Any, dtype: Any, mask: Any) -> Any:
    """Floating-point leaves in another type, where the mask has them."""

    def cast(leaf: Any, wanted: bool = True) -> Any:
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(leaf, dtype) if wanted and is_float else leaf

    return jax.tree.map(cast, params) if mask is None else jax.tree.map(cast, params, mask)


def turn(kernel: Any) -> Any:
    """A kernel with its two dimensions exchanged."""
    if isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(kernel.shape[::-1], kernel.dtype)
    return jnp.asarray(kernel).T
