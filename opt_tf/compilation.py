"""Programs that XLA compiles: what they are made for, and what goes into them.

A program belongs to a model and to what is fixed in it; those of generation to the settings that
decide their structure. Shapes come from a few lengths only, and all that is a number is an input:
another prompt, seed or temperature finds the program made already.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import (
    ProgramSettings,
    Request,
    allocate_tokens,
    bucket,
    split_settings,
)

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM, TFOPTPreTrainedModel

JIT_COMPILE = True
"""Whether XLA compiles the programs; tests of the logic alone switch it off, to save time."""


def compiled(
    model: "TFOPTPreTrainedModel", program: Callable[..., Any], *fixed: Any
) -> Callable[..., Any]:
    """A program, compiled once for each shape of its inputs.

    Args:
        model: The model; its weights are read anew at every call.
        program: Called with the model, what is fixed, and the inputs.
        *fixed: What the program is made for, hashable.

    Returns:
        A function of the inputs.
    """
    key = (program, model.config.snapshot(), *fixed)
    if key not in model.programs:
        run = partial(program, model, *fixed)
        model.programs[key] = tf.function(run, jit_compile=JIT_COMPILE, autograph=False)
    return model.programs[key]


def generation_program(
    model: "TFOPTForCausalLM", request: Request, program: Callable[..., Any]
) -> Callable[..., Any]:
    """A program of generation.

    Args:
        model: The language model.
        request: Its settings are the program's, except for numbers.
        program: Called with the model, the settings (`program_settings`), the inputs
            (`program_inputs`) and further tensors.

    Returns:
        A function of the inputs and further tensors.
    """
    structure, _ = split_settings(request.settings)
    fixed = (structure, request.vocabulary, request.pad, request.chunk)
    return compiled(model, _run, program, *fixed)


def program_settings(
    settings: GenerationConfig, vocabulary: int, pad: int, chunk: int | None, **numbers: Any
) -> ProgramSettings:
    """The settings of a program of generation, numbers in place of theirs, and more."""
    return ProgramSettings(
        settings, {"vocabulary": vocabulary, "pad": pad, "chunk": chunk} | numbers
    )


def program_inputs(request: Request, slots: int) -> dict[str, Any]:
    """The inputs of every program of generation, as tensors.

    Args:
        request: What to generate.
        slots: Slots S of a row.

    Returns:
        `history` (B, S), the prompts with free slots behind them, and `mask`, False at padding;
        `ids` (B, T), the prompts padded on the right; `seed`; the lengths `prompt` and
        `new_tokens`; `past`, the parts of a cache, if there is one; and `numbers`, those of the
        settings.
    """
    history, mask = allocate_tokens(request, slots)
    prompt, past = request.ids.shape[1], request.past
    held = {}
    if past is not None:
        held["past"] = (past.keys, past.values, tf.constant(int(past.length), tf.int32))
    return held | {
        "ids": tf.constant(history[:, : bucket(prompt)]),
        "history": tf.constant(history),
        "mask": tf.constant(mask),
        "prompt": tf.constant(prompt, tf.int32),
        "new_tokens": tf.constant(request.new_tokens, tf.int32),
        "seed": tf.constant(request.seed, tf.int64),
        "numbers": {k: tf.constant(v) for k, v in split_settings(request.settings)[1].items()},
    }


def _run(
    model: "TFOPTForCausalLM",
    program: Callable[..., Any],
    structure: GenerationConfig,
    vocabulary: int,
    pad: int,
    chunk: int | None,
    inputs: dict[str, Any],
    *state: Any,
) -> Any:
    settings = program_settings(structure, vocabulary, pad, chunk, **inputs["numbers"])
    return program(model, settings, inputs, *state)
