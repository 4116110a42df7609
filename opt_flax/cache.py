"""The key-value cache: buffers of a fixed size, and positions that follow from what they hold."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.sharding import Mesh

from opt_core import inputs as rules
from opt_core.compatibility.caches import CacheMixin
from opt_core.config import OPTConfig
from opt_core.params import POSITION_OFFSET
from opt_flax.sharding import constrain_rows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class KVCache(CacheMixin):
    """Keys and values of the tokens seen so far.

    A cache is a value: writing gives new buffers (within a compiled program XLA writes in place),
    so one cache may be continued in several ways.

    Attributes:
        keys: One (B, H, S, K) buffer per layer.
        values: One (B, H, S, K) buffer per layer.
        length: Slots filled; a number, or a traced scalar inside a compiled program.
        mask: (B, S) bool, True where a filled slot holds a token and False where it holds padding;
            None while no padding was seen.
        grows: Whether it is made larger where it is full; one of `init_cache` is not.
    """

    keys: tuple[Array, ...] = ()
    values: tuple[Array, ...] = ()
    length: int | Array = 0
    mask: Array | None = None
    grows: bool = field(default=False, metadata={"static": True})

    @property
    def max_length(self) -> int:
        """Slots S there are."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def is_empty(self) -> bool:
        """Whether it is known to hold nothing yet."""
        return isinstance(self.length, int) and self.length == 0

    @property
    def known_length(self) -> int | None:
        """Slots filled, where that can be read now."""
        return None if isinstance(self.length, Tracer) else int(self.length)

    def write(self, layer: int, key_BHTK: Array, value_BHTK: Array) -> tuple[Array, Array]:
        """Stores one layer's new keys and values behind the present ones.

        Returns:
            The layer's buffers (B, H, S, K) with them.
        """
        if not self.keys:  # nothing is copied before something follows
            return key_BHTK, value_BHTK
        return self._put(self.keys[layer], key_BHTK), self._put(self.values[layer], value_BHTK)

    def _put(self, buffer: Array, new_BHTK: Array) -> Array:
        write = lax.dynamic_update_slice
        if buffer.shape[0] != 1:
            return write(buffer, new_BHTK, (0, 0, self.length, 0))
        return write(buffer[0], new_BHTK[0], (0, self.length, 0))[None]  # as in `squeezed`

    def squeezed(self) -> "KVCache":
        """The same without the axis of a single row, as a compiled loop had better carry it.

        XLA leaves that axis out of attention's products. A loop that has it copies every buffer
        twice in each step: for the products, and for the next step.
        """
        is_single = self.keys[0].shape[0] == 1
        return self._each(lambda buffer: buffer[0]) if is_single else self

    def unsqueezed(self) -> "KVCache":
        """The cache that `squeezed` was made of."""
        is_squeezed = self.keys[0].ndim == 3
        return self._each(lambda buffer: buffer[None]) if is_squeezed else self

    def _each(self, change: Callable[[Array], Array]) -> "KVCache":
        keys, values = tuple(map(change, self.keys)), tuple(map(change, self.values))
        return replace(self, keys=keys, values=values)

    def visible(self, count: int) -> int:
        """Slots to look at with `count` new tokens: these alone, or all there are.

        All, and not only the filled ones, so that every step has the same shapes: JAX compiles
        each operation anew for each shape.
        """
        return count if self.is_empty else self.max_length

    def filled(self, count: int) -> int:
        """Slots filled once `count` more tokens are in, as far as that is known."""
        return self.length + count if isinstance(self.length, int) else self.max_length

    def advance(
        self,
        count: int,
        mask_BS: Array | None,
        keys: tuple[Array, ...],
        values: tuple[Array, ...],
    ) -> "KVCache":
        """The cache after `count` more tokens.

        Args:
            count: New tokens T.
            mask_BS: bool, False at padding, for the visible slots; None: as this cache knows it,
                no new token is padding.
            keys: The buffers that `write` returned.
            values: The buffers that `write` returned.
        """
        if not self.keys:
            return KVCache(keys, values, count, mask_BS, grows=True)
        if mask_BS is not None:
            free = ((0, 0), (0, self.max_length - self.visible(count)))
            mask_BS = jnp.pad(mask_BS, free, constant_values=True)
        mask = self.mask if mask_BS is None else mask_BS
        return replace(self, keys=keys, values=values, length=self.length + count, mask=mask)

    def crop(self, length: int) -> "KVCache":
        """Goes back to the first `length` slots: what is behind them is overwritten.

        Args:
            length: How many; less than 0: so many are given up.

        Returns:
            The cache that goes on; this one stays as it is.

        Raises:
            InputError: There are not so many.
        """
        length = rules.cropped_length(length, self.known_length)
        mask = self.mask
        if mask is not None:
            mask = mask | (jnp.arange(self.max_length) >= length)
        return replace(self, length=length, mask=mask)

    def resize(self, rows: int, max_length: int, mesh: Mesh | None = None) -> "KVCache":
        """A cache of other buffers that holds the same, so that one prompt can have many endings.

        Args:
            rows: Rows B of it; a cache of one row is repeated.
            max_length: Slots S of it, enough for what there is.
            mesh: Devices to spread the buffers over; None: one device.

        Raises:
            InputError: The rows or the slots do not fit.
        """
        rules.check_resize(self.keys[0].shape[0], self.known_length, rows, max_length)
        count = min(max_length, self.max_length)

        def copy(old: Array, value: float, slots: int, heads: int | None = None) -> Array:
            shape = [rows, *old.shape[1:]]
            shape[slots] = max_length
            kept = lax.slice_in_dim(old, 0, count, axis=slots)
            new = jnp.full(shape, value, old.dtype)
            new = lax.dynamic_update_slice(
                new, jnp.broadcast_to(kept, (rows, *kept.shape[1:])), (0,) * old.ndim
            )
            return constrain_rows(new, mesh, heads)

        return replace(
            self,
            keys=tuple(copy(buffer, 0, 2, 1) for buffer in self.keys),
            values=tuple(copy(buffer, 0, 2, 1) for buffer in self.values),
            mask=None if self.mask is None else copy(self.mask, True, 1),
            grows=False,
        )

    def select(self, rows: Array) -> "KVCache":
        """The cache of other rows: `rows[i]` becomes row i.

        Args:
            rows: (any,) integer row numbers.
        """
        mask = None if self.mask is None else self.mask[rows]
        return replace(self._each(lambda buffer: buffer[rows]), mask=mask)

    def regroup(self, index_BW: Array, mesh: Mesh | None = None) -> "KVCache":
        """The cache of other rows, each chosen within its own prompt's: no device asks another.

        Args:
            index_BW: Integers: row `w` of prompt `b` becomes that prompt's row `index_BW[b, w]`.
            mesh: Devices that the cache is spread over; None: one device.
        """
        B, W = index_BW.shape

        def choose(buffer: Array, heads: int | None = None) -> Array:
            groups = buffer.reshape(B, -1, *buffer.shape[1:])
            groups = constrain_rows(groups, mesh, heads and heads + 1)
            rows = jax.vmap(lambda group, index: group[index])(groups, index_BW)
            return constrain_rows(rows.reshape(B * W, *buffer.shape[1:]), mesh, heads)

        return replace(
            self,
            keys=tuple(choose(buffer, 1) for buffer in self.keys),
            values=tuple(choose(buffer, 1) for buffer in self.values),
            mask=None if self.mask is None else choose(self.mask),
        )


def init_cache(
    config: OPTConfig,
    batch_size: int,
    max_length: int,
    dtype: jnp.dtype,
    mesh: Mesh | None = None,
) -> KVCache:
    """An empty cache.

    Args:
        config: The model's configuration.
        batch_size: Rows B.
        max_length: Slots S, for the prompt and everything after it.
        dtype: Type of the keys and values: the model's.
        mesh: Devices to spread the buffers over, by rows and heads; None: one device.
    """
    rules.check_cache_size(batch_size, max_length)
    shape = (batch_size, config.num_attention_heads, max_length, config.head_dim)
    buffers = [
        constrain_rows(jnp.zeros(shape, dtype), mesh, heads=1)
        for _ in range(2 * config.num_hidden_layers)
    ]
    return KVCache(tuple(buffers[::2]), tuple(buffers[1::2]))


def position_rows(mask_BS: Array | None, past: int | Array, count: int) -> Array:
    """Rows of the position table for the newest tokens.

    A token's position is the number of real tokens before it, so padding never shifts one; a padded
    token reads row 1 (transformers' `cumsum(mask) * mask - 1 + 2`).

    Args:
        mask_BS: bool (B, S), False at padding; None if there is none.
        past: Tokens already in the cache.
        count: New tokens T.

    Returns:
        Row numbers (B, T), or (1, T) without a mask.
    """
    if mask_BS is None:
        return past + POSITION_OFFSET + jnp.arange(count, dtype=jnp.int32)[None]
    counts_BS = jnp.cumsum(mask_BS, 1, dtype=jnp.int32) * mask_BS
    return lax.dynamic_slice_in_dim(counts_BS, past, count, 1) - 1 + POSITION_OFFSET
