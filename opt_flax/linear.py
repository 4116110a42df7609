"""Linear layers and embeddings: what holds a parameter, and the product it takes part in.

A weight is kept as [out, in], as in PyTorch and in checkpoints, and is not called `kernel`, which
in Flax means [in, out]: XLA's CPU products of one row and of eight read this layout 1.2 to 2.9
times as fast, those of many rows as fast; accelerators choose layouts of their own. The values are
left for `opt_flax.checkpoint` to fill in.
"""

import math
from functools import partial

import jax
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
    """`input @ weight.T + bias`; on a mesh rows of zeros may end the weight, so that it divides."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, mesh: Mesh | None = None
    ):
        self.in_features, self.out_features, self.mesh = in_features, out_features, mesh
        self.weight = nnx.Param(None)
        self.bias = nnx.Param(None) if bias else None

    def __call__(self, input: Array) -> Array:
        """Computes the product."""
        out = linear(input, self.weight[...], self.mesh)
        if out.shape[-1] > self.out_features:
            out = out[..., : self.out_features]
        return out if self.bias is None else out + self.bias[...]


class Embedding(nnx.Module):
    """A table of rows; on a mesh rows of zeros may end it, so that it divides."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        mesh: Mesh | None = None,
        axis: str = "vocab",
    ):
        """Leaves the table to be filled in.

        Args:
            num_embeddings: Its rows.
            embedding_dim: Its columns.
            padding_idx: The row that gets no gradient.
            mesh: Where the model is; None: on one device.
            axis: Logical axis of the rows: "vocab", where a row that there is not reads as NaN, or
                "position", where it reads as the last one.
        """
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.mesh, self.axis = padding_idx, mesh, axis
        self.embedding = nnx.Param(None)

    def __call__(self, rows: Array) -> Array:
        """Looks rows up; the padding row gets no gradient here, as in PyTorch's `padding_idx`."""
        table, is_token = self.embedding[...], self.axis == "vocab"
        if rows.shape[1] > 1:  # decoding looks its few tokens up where the table is
            table = constrain_table(table, rows.shape[0], self.axis, self.mesh)
            rows = constrain_rows(rows, self.mesh)
        if is_token and self.num_embeddings < table.shape[0]:
            rows = jnp.where(rows < self.num_embeddings, rows, table.shape[0])
        found = jnp.take(table, rows, axis=0, mode="fill" if is_token else "clip")
        if self.padding_idx is None:
            return found
        return jnp.where((rows == self.padding_idx)[..., None], lax.stop_gradient(found), found)

    def attend(self, hidden: Array) -> Array:
        """The product with the table: a tied language-model head."""
        return linear(hidden, self.embedding[...], self.mesh)[..., : self.num_embeddings]


def linear(input: Array, weight: Array, mesh: Mesh | None = None) -> Array:
    """`input @ weight.T`, for an input (..., I) and a weight (O, I)."""
    rows = math.prod(input.shape[:-1])
    if isinstance(rows, int) and rows <= FEW_ROWS:
        here = partial(_reversed, mesh)
    elif isinstance(rows, int) and mesh is None:
        here = _turned
    else:
        return _plain(input, weight)
    return lax.platform_dependent(input, weight, cpu=here, default=_plain)


def apply_dropout(values: Array, rate: float, key: Array | None) -> Array:
    """Dropout: zeroes a share of the values and scales up the others; none without a key.

    Args:
        values: Any float array.
        rate: The share.
        key: Random key. The same one drops the same values, also when they are computed again.
    """
    if key is None or rate == 0:
        return values
    kept = jax.random.bernoulli(key, 1 - rate, values.shape)
    return jnp.where(kept, values / (1 - rate), 0).astype(values.dtype)


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
