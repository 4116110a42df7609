"""Small checkpoints on disk, and what is in them."""

from pathlib import Path
from typing import Any

import numpy as np

from conversion.readers import open_any_checkpoint
from tests.support.files.checkpoint_fixtures import TINY, Weights, random_weights, write


def make(folder: Path, config: Any = TINY, dtype: str = "float32", **more: Any) -> Weights:
    weights = random_weights(config, dtype=dtype, **more)
    write(folder, weights)
    config.save_pretrained(folder)
    return weights


def values(folder: Path) -> Weights:
    tensors = open_any_checkpoint(folder).checkpoint.tensors
    return {name: np.array(tensor.read()) for name, tensor in tensors.items()}


def assert_values(folder: Path, expected: Weights) -> None:
    found = values(folder)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape), name
        assert found[name].tobytes() == array.tobytes(), name  # bits: NaN is no equal of NaN
