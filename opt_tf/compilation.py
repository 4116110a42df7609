"""Programs that XLA compiles: what they are made for, and what goes into them.

A program belongs to a model and to what is fixed in it; those of generation to the structure of the
rules (`opt_core.generation.rules`). Shapes come from a few lengths only, and all that is a number
is an input: another prompt, seed or temperature finds the program made already.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import tensorflow as tf

from opt_core.generation.request import Request, allocate_tokens, bucket, pad_right
from opt_core.generation.rules import Rules, Structure, make_rules, make_structure

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM, TFOPTPreTrainedModel

SMALL = 1 << 20
"""Parameters of a model up to which a CPU runs its programs as graphs. XLA compiles each for
seconds: longer than all that such a model, made to try something out, ever computes."""


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
    return _keep(model, True, program, *fixed)


def traced(
    model: "TFOPTForCausalLM", program: Callable[..., Any], *fixed: Any
) -> Callable[..., Any]:
    """A part of programs, traced once for all that call it with inputs of the same shapes.

    Args:
        model: The model; its weights are read anew at every call.
        program: Called with the model, what is fixed, and the inputs.
        *fixed: What the part is made for, hashable.

    Returns:
        A function of the inputs, which are tensors.
    """
    return _keep(model, False, program, *fixed)


def _keep(
    model: "TFOPTPreTrainedModel", by_xla: bool, program: Callable[..., Any], *fixed: Any
) -> Callable[..., Any]:
    key = (program, model.config.snapshot(), *fixed)
    if key not in model.programs:
        run = partial(program, model, *fixed)
        jit_compile = True if by_xla and not _is_small(model) else None
        model.programs[key] = tf.function(run, jit_compile=jit_compile, autograph=False)
    return model.programs[key]


def _is_small(model: "TFOPTPreTrainedModel") -> bool:
    """Whether a CPU has little to compute."""
    return model.count_params() <= SMALL and not tf.config.list_physical_devices("GPU")


def generation_program(
    model: "TFOPTForCausalLM", request: Request, program: Callable[..., Any]
) -> Callable[..., Any]:
    """A program of generation.

    Args:
        model: The language model.
        request: The structure of its rules is the program's.
        program: Called with the model, the `Rules`, the inputs (`program_inputs`) and further
            tensors.

    Returns:
        A function of the inputs and further tensors.
    """
    structure = make_structure(request, is_compiled=True)
    return compiled(model, _run, program, structure, request.chunk)


def prompt_inputs(request: Request, slots: int) -> dict[str, Any]:
    """The inputs of the program that reads the prompts, as tensors.

    Args:
        request: What to generate.
        slots: Slots S of a row.

    Returns:
        `ids` (B, T), the prompts padded on the right; `mask` (B, S), False at padding; the length
        `prompt`; and `past`, the parts of a cache, if there is one.
    """
    prompt, past = request.ids.shape[1], request.past
    ids = pad_right(request.ids, min(bucket(prompt), slots), request.pad)
    held = {}
    if past is not None:
        held["past"] = (past.keys, past.values, tf.constant(int(past.length), tf.int32))
    return held | {
        "ids": tf.constant(ids),
        "mask": tf.constant(pad_right(request.full_mask(), slots, True)),
        "prompt": tf.constant(prompt, tf.int32),
    }


def program_inputs(request: Request, slots: int) -> dict[str, Any]:
    """The inputs of the programs that choose tokens, as tensors.

    Args:
        request: What to generate.
        slots: Slots S of a row.

    Returns:
        `history` (B, S), the prompts with free slots behind them, and `mask`, False at padding;
        `seed`; the length `prompt`; and `numbers`, those of the rules.
    """
    history, mask = allocate_tokens(request, slots)
    return {
        "history": tf.constant(history),
        "mask": tf.constant(mask),
        "prompt": tf.constant(request.ids.shape[1], tf.int32),
        "seed": tf.constant(request.seed, tf.int64),
        "numbers": {name: tf.constant(x) for name, x in make_rules(request, True)[1].items()},
    }


def _run(
    model: "TFOPTForCausalLM",
    program: Callable[..., Any],
    structure: Structure,
    chunk: int | None,
    inputs: dict[str, Any],
    *state: Any,
) -> Any:
    return program(model, Rules(structure, inputs["numbers"] | {"chunk": chunk}), inputs, *state)
