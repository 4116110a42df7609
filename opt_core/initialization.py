"""Fresh weights, drawn by NumPy so that one seed gives the same model in every framework."""

import zlib

import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.params import ParamSpec


def initial_value(spec: ParamSpec, config: OPTConfig, seed: int) -> NDArray[np.float32]:
    """The starting value of one parameter, as `transformers` initialises OPT.

    Weights are N(0, `init_std`), norms are 1 and biases 0; the padding row of the token embedding
    is 0. Every tensor has a random stream of its own, named by the tensor, so the order of calls
    is free.

    Args:
        spec: The parameter.
        config: The model's configuration.
        seed: Seed of the whole model.

    Returns:
        float32, of `spec.shape`.
    """
    if spec.name.endswith(".bias"):
        return np.zeros(spec.shape, np.float32)
    if spec.kind == "norm":
        return np.ones(spec.shape, np.float32)
    rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    value = rng.standard_normal(spec.shape, np.float32)
    value *= np.float32(config.init_std)
    if spec.name.endswith("embed_tokens.weight") and config.pad_token_id is not None:
        value[config.pad_token_id] = 0
    return value
