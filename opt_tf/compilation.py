"""Programs that XLA compiles for generation: what they are made for, and what goes into them.

A program belongs to a model and to those settings that decide its structure. Shapes come from a few
lengths only, and all that is a number is an input: another prompt, seed or temperature finds the
program made already.
"""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import tensorflow as tf

from opt_core.generation.config import GenerationConfig

if TYPE_CHECKING:
    from opt_tf.generation import Request
    from opt_tf.modeling import TFOPTForCausalLM

_NUMBERS: dict[str, Any] = {
    "repetition_penalty": np.float32, "min_length": np.int32, "min_new_tokens": np.int32,
    "temperature": np.float32, "top_p": np.float32, "min_p": np.float32, "typical_p": np.float32,
    "length_penalty": np.float32,
}  # fmt: skip
_NO_PART = (
    *("max_length", "max_new_tokens", "bos_token_id", "pad_token_id", "stop_strings"),
    *("prompt_lookup_num_tokens", "max_matching_ngram_size", "num_assistant_tokens"),
    "prefill_chunk_size",
)
_NEUTRAL = vars(GenerationConfig())


JIT_COMPILE = True
"""Whether XLA compiles the programs; tests of the logic alone switch it off, to save time."""


def bucket(length: int) -> int:
    """The length that something so long is padded to: 32, 64, 128, 256, 512, 768, ..."""
    return next((size for size in (32, 64, 128) if size >= length), -(-length // 256) * 256)


def program_inputs(
    request: "Request", history: np.ndarray, mask: np.ndarray, seed: int
) -> dict[str, Any]:
    """What every program gets, as tensors.

    Args:
        request: What to generate.
        history: (B, S) prompts with room for new tokens behind them.
        mask: bool (B, S), False at padding.
        seed: Seed of sampling.

    Returns:
        `ids` (B, T), the prompts padded on the right; `history`, `mask` and `seed`; the lengths
        `prompt` and `new_tokens`; `past`, the parts of a cache, if there is one; and `numbers`,
        the settings that are numbers and not neutral.
    """
    values = vars(request.settings)
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
        "seed": tf.constant(seed, tf.int64),
        "numbers": {
            name: tf.constant(kind(values[name]))
            for name, kind in _NUMBERS.items()
            if values[name] not in (_NEUTRAL[name], None)
        },
    }


def program_settings(
    settings: GenerationConfig, vocabulary: int, pad: int, **changes: Any
) -> SimpleNamespace:
    """What a program knows of the settings, some of them changed."""
    return SimpleNamespace(
        **vars(settings) | {"block": None} | changes,
        eos_ids=settings.eos_ids,
        vocabulary=vocabulary,
        pad=pad,
    )


def compiled(
    model: "TFOPTForCausalLM", request: "Request", program: Callable[..., Any]
) -> Callable[..., Any]:
    """A program, compiled once for each shape of its inputs.

    Args:
        model: The language model; its weights are read anew at every call.
        request: Its settings are the program's, except for numbers.
        program: Called with the model, the settings (those among the inputs are tensors, those
            neutral are not), the inputs (`program_inputs`) and further tensors.

    Returns:
        A function of the inputs and further tensors.
    """
    neutral = {name: _NEUTRAL[name] for name in (*_NUMBERS, *_NO_PART)}
    neutral["block"] = request.block
    key = (program, request.vocabulary, request.pad, *(vars(request.settings) | neutral).values())
    if key not in model.programs:
        fixed = program_settings(request.settings, request.vocabulary, request.pad, **neutral)
        run = partial(_run, program, model, fixed)
        model.programs[key] = tf.function(run, jit_compile=JIT_COMPILE, autograph=False)
    return model.programs[key]


def _run(
    program: Callable[..., Any],
    model: "TFOPTForCausalLM",
    fixed: SimpleNamespace,
    inputs: dict[str, Any],
    *state: Any,
) -> Any:
    return program(model, SimpleNamespace(**vars(fixed) | inputs["numbers"]), inputs, *state)
