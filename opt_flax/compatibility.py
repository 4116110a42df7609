"""The layer for code written for `transformers`: what Flax has to do for it."""

from typing import Any

import jax
from flax import nnx

from opt_core.compatibility.calls import CallOptions


class FlaxCallOptions(CallOptions, total=False):
    """What a Flax model's call takes beside its own arguments.

    Attributes:
        train: The opposite of `deterministic`.
        dropout_rng: A key in place of `rngs`.
    """

    train: bool | None
    dropout_rng: Any


def split_mode(
    options: FlaxCallOptions, deterministic: bool | None, rngs: nnx.Rngs | None
) -> tuple[CallOptions, bool | None, nnx.Rngs | None]:
    """Takes the training mode out of a call's options: the rest, `deterministic` and `rngs`."""
    rest: Any = dict(options)
    train, key = rest.pop("train", None), rest.pop("dropout_rng", None)
    if train is not None and deterministic is None:
        deterministic = not train
    if key is not None and rngs is None:
        if not jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
            key = jax.random.wrap_key_data(key)
        rngs = nnx.Rngs(dropout=key)
    return rest, deterministic, rngs
