"""A cache whose rows are written at places of their own."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from opt_flax.cache import KVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class RowsCache(KVCache):
    """A cache whose rows are written at places of their own, one token each.

    Attributes:
        places: (B,) the slot of each row's new token.
    """

    places: Array = field(default_factory=lambda: jnp.zeros(0, jnp.int32))

    def _put(self, buffer: Array, new_BHTK: Array) -> Array:
        return jax.vmap(partial(lax.dynamic_update_slice_in_dim, axis=1))(
            buffer, new_BHTK, self.places
        )
