"""Models whose call is a caller's: generation then calls the model for each token.

The loops of the backends run the decoder and the head, which is what a model's call does. A class
that has another one, a function or a hook that was put on a model, and PEFT's prompts, which come
in by `prepare_inputs_for_generation`, would not be seen there.
"""

from typing import Any

import numpy as np

from opt_core.compatibility.subclasses import is_own
from opt_core.errors import GenerationError

_PREPARE = "prepare_inputs_for_generation"


def has_own_call(model: Any) -> bool:
    """Whether calling the model, or making its inputs, is not this library's alone."""
    kinds = [kind for kind in type(model).__mro__ if is_own(kind)]
    return model._is_patched() or any(vars(kind).keys() & model._steps for kind in kinds)


def read(steps: Any, output_attentions: bool, output_hidden_states: bool) -> tuple[Any, ...]:
    """Reads the tokens that are new: the prompts, then one of each row.

    Args:
        steps: The generation (`opt_core.generation.observed.Steps`).
        output_attentions: Whether attention weights are wanted.
        output_hidden_states: Whether hidden states are wanted.

    Returns:
        Logits (R, V) after them, the cache that holds them, attention weights and hidden states.

    Raises:
        GenerationError: The call returns no logits.
    """
    model, request, is_first = steps.model, steps.request, steps.made == 0
    mask = np.ones((len(steps.history), steps.end), np.int32)
    if request.mask is not None:
        mask[:, : steps.prompt] = request.mask.repeat(steps.copies, 0)
    given: dict[str, Any] = {
        "past_key_values": steps.cache,
        "attention_mask": steps.tensor(mask),
    }
    ids = steps.tensor(steps.history[:, : steps.end])
    if is_first and request.embeds is not None:
        embeds = steps.array(request.embeds).repeat(steps.copies, 0)
        given["inputs_embeds"] = steps.tensor(embeds)
    if _PREPARE in model._steps:
        new = {"is_first_iteration": is_first, "next_sequence_length": None if is_first else 1}
        inputs = model.prepare_inputs_for_generation(ids, use_cache=True, **given, **new)
    else:
        inputs = given if "inputs_embeds" in given else {**given, "input_ids": ids}
        if not is_first:
            inputs["input_ids"] = ids[:, -1:]
    wanted = {
        "output_attentions": output_attentions,
        "output_hidden_states": output_hidden_states,
    }
    out = model(**{**inputs, "use_cache": True, **{k: True for k, v in wanted.items() if v}})
    if getattr(out, "logits", None) is None:
        raise GenerationError(
            f"{type(model).__name__}: generate needs a call that returns logits and "
            f"past_key_values, received {type(out).__name__}"
        )
    return out.logits[:, -1], out.past_key_values, out.attentions, out.hidden_states
