"""Linear layers and embeddings: what holds a parameter, and the product it takes part in.

A weight is kept as [out, in], as in PyTorch and in checkpoints, and is not called `kernel`, which
in Flax means [in, out]: XLA's CPU products of one row and of eight read this layout 1.2 to 2.9
times as fast, those of many rows as fast; accelerators choose layouts of their own. The values are
left for `opt_flax.checkpoint` to fill in.
"""

import math
from functools import partial

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

from opt_flax.sharding import constrain_rows, constrain_table

FEW_ROWS = 64
"""Up to so many rows a CPU's product is computed the other way round, whatever XLA makes of it."""
_PARTS = (8, 4, 2)
"""Parts of the weight that a single row is multiplied with: the most that divide it evenly."""
_MULTIPLE = 8
"""More than half as many rows are filled up to a multiple: others cost up to half as much again."""


class Linear(nnx.Module):
    """`input @ weight.T + bias`."""

    def __init__(self, use_bias: bool, mesh: Mesh | None = None):
        self.mesh = mesh
        self.weight = nnx.Param(None)
        self.bias = nnx.Param(None) if use_bias else None

    def __call__(self, input: Array) -> Array:
        """Computes the product."""
        out = product(input, self.weight[...], self.mesh)
        return out if self.bias is None else out + self.bias[...]


class Embedding(nnx.Module):
    """A table of rows; on a mesh it may have rows of zeros at the end, so that it divides."""

    def __init__(self, mesh: Mesh | None, size: int | None = None, padding: int | None = None):
        self.embedding = nnx.Param(None)
        self.mesh = mesh
        self.size = size
        self.padding = padding

    def __call__(self, rows: Array, mode: str = "fill") -> Array:
        """Looks rows up; the padding row gets no gradient here, as in PyTorch's `padding_idx`.

        Args:
            rows: (B, T) integers.
            mode: What a row number beyond the table gives: "fill" for NaN, "clip" for the last row.
        """
        table = self.embedding[...]
        if rows.shape[1] > 1:  # decoding looks its few tokens up where the table is
            axis = "position" if self.size is None else "vocab"
            table = constrain_table(table, rows.shape[0], axis, self.mesh)
            rows = constrain_rows(rows, self.mesh)
        if self.size is not None and self.size < table.shape[0]:
            rows = jnp.where(rows < self.size, rows, table.shape[0])
        found = jnp.take(table, rows, axis=0, mode=mode)
        if self.padding is None:
            return found
        return jnp.where((rows == self.padding)[..., None], lax.stop_gradient(found), found)

    def attend(self, hidden: Array, count: int) -> Array:
        """The product with the table, its first `count` rows: a tied language-model head."""
        return product(hidden, self.embedding[...], self.mesh)[..., :count]


def product(input: Array, weight: Array, mesh: Mesh | None = None) -> Array:
    """`input @ weight.T`, for an input (..., I) and a weight (O, I)."""
    rows = math.prod(input.shape[:-1])
    if isinstance(rows, int) and rows <= FEW_ROWS:
        here = partial(_reversed, mesh)
    elif isinstance(rows, int) and mesh is None:
        here = _turned
    else:
        return _plain(input, weight)
    return lax.platform_dependent(input, weight, cpu=here, default=_plain)


def _plain(input: Array, weight: Array) -> Array:
    return jnp.einsum("...i,oi->...o", input, weight)


def _turned(input: Array, weight: Array) -> Array:
    """The other way round too, but XLA may turn it back: training is a twelfth faster so."""
    columns = jnp.einsum("oi,bi->ob", weight, input.reshape(-1, input.shape[-1]))
    return columns.T.reshape(*input.shape[:-1], len(weight))


def _reversed(mesh: Mesh | None, input: Array, weight: Array) -> Array:
    """XLA's library for products rearranges the right factor at every call: here the small one.

    The barrier keeps XLA from turning the product round again. A single row is multiplied with
    parts of the weight, each of which gets a thread of its own; on a mesh the weight is in parts
    already, and others would have to be sent around.
    """
    (out, width), rows = weight.shape, input.reshape(-1, input.shape[-1])
    count = len(rows)
    parts = next((parts for parts in _PARTS if out % parts == 0), 1)
    if count == 1 and parts > 1 and mesh is None:
        pieces = weight.reshape(parts, -1, width)
        each = jnp.einsum("poi,pbi->pob", pieces, jnp.broadcast_to(rows, (parts, 1, width)))
    else:
        if 2 * count > _MULTIPLE:
            rows = jnp.pad(rows, ((0, -count % _MULTIPLE), (0, 0)))
        each = jnp.einsum("oi,bi->ob", weight, rows)
    columns = lax.optimization_barrier(each).reshape(out, -1)[:, :count]
    return columns.T.reshape(*input.shape[:-1], out)
