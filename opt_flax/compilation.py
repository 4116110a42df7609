"""Compiled programs of generation: what they are made for, and what they take as arguments.

A program belongs to a model's structure and to that of the rules (`opt_core.generation.rules`).
Shapes come from a few lengths only, and all that is a number is an argument: another prompt, seed
or temperature finds the program made already.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax import Array

from opt_core.generation.request import Request, bucket, pad_right
from opt_core.generation.rules import Rules
from opt_flax.cache import KVCache
from opt_flax.generation.prefill import copy_rows, prefill_prompts
from opt_flax.programs import Program

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM

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


def read_prompts(
    model: "FlaxOPTForCausalLM", parts: Any, request: Request, slots: int, copies: int
) -> tuple[Array, KVCache]:
    """Reads the prompts of a request, and makes several rows of each.

    The program that reads them is the same for all that may follow.

    Args:
        model: The language model.
        parts: The model's, as `nnx.split` gives them.
        request: What to generate.
        slots: Slots S of the cache.
        copies: Rows of each prompt; there are R of them in all.

    Returns:
        Logits (R, V) after the last token, and the cache that holds the prompts.
    """
    graph, state = parts
    prompts = program_inputs(request, slots)
    logits, cache = _read_prompts(graph, state, prompts, request.chunk, slots)
    return copy_rows(logits, cache, copies, model.mesh)


@partial(Program, static_argnames=("graph", "chunk", "slots"))
def _read_prompts(
    graph: Any, state: Any, prompts: Prompts, chunk: int | None, slots: int
) -> tuple[Array, KVCache]:
    return prefill_prompts(nnx.merge(graph, state), prompts, chunk, slots)
