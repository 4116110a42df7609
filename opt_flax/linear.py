"""Linear layers and embeddings: what holds a parameter, and the product it takes part in.

A kernel is kept as [in, out], as everywhere in Flax: XLA's CPU products read that layout fastest,
for one row and for a few; accelerators choose layouts of their own. The values are left for
`opt_flax.checkpoint` to fill in.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.sharding import Mesh

from opt_flax.parallel import constrain_rows, constrain_table


class Linear(nnx.Module):
    """`input @ kernel + bias`."""

    def __init__(self, use_bias: bool):
        self.kernel = nnx.Param(None)
        self.bias = nnx.Param(None) if use_bias else None

    def __call__(self, input: Array) -> Array:
        """Computes the product."""
        out = jnp.matmul(input, self.kernel[...])
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
        return jnp.einsum("...p,vp->...v", hidden, self.embedding[...])[..., :count]
