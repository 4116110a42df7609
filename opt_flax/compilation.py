"""Compiled programs of generation: what they are made for, and what they take as arguments.

A program belongs to a model's structure and to that of the rules (`opt_core.generation.rules`).
Shapes come from a few lengths only, and all that is a number is an argument: another prompt, seed
or temperature finds the program made already.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from opt_core.generation.request import Request, bucket, pad_right
from opt_core.generation.rules import Rules
from opt_flax.cache import KVCache

# In a program the numbers are traced; the rest tells it from others.
jax.tree_util.register_pytree_node(
    Rules,
    lambda rules: ((rules.numbers,), rules.structure),
    lambda structure, numbers: Rules(structure, *numbers),
)


class Prompts(NamedTuple):
    """The prompts of a request as a program takes them.

    Attributes:
        ids: (B, T), filled up on the right to the length of a bucket. What lies there is hidden by
            causality; new tokens take its slots.
        mask: bool, False at padding: (B, T), or (B, S) where a program reads a chunk at a time;
            None if nothing is padded.
        length: Tokens T there really are.
        past: A cache that holds the beginning of the prompts, or None.
    """

    ids: Any
    mask: Any
    length: Any
    past: KVCache | None


def program_inputs(request: Request, slots: int) -> Prompts:
    """The prompts of a request, for a program with so many slots."""
    T, mask = request.ids.shape[1], request.mask
    if mask is not None:
        mask = pad_right(mask, bucket(T) if request.chunk is None else slots, True)
    ids = pad_right(request.ids, bucket(T), request.pad)
    return Prompts(ids, mask, np.int32(T), request.past)
