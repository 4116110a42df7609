"""Arguments of `generate` in `transformers` beside the settings."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import numpy as np

from opt_core.compatibility.caches import CacheMixin
from opt_core.compatibility.notices import notice
from opt_core.errors import GenerationError
from opt_core.generation import filters
from opt_core.text.adapter import as_tokenizer

_WITHOUT_EFFECT = (
    *("token_type_ids", "labels", "logits_to_keep", "num_logits_to_keep", "trust_remote_code"),
)
_REFUSED = {
    "head_mask": "heads are switched off in a call of the model alone",
    "generator": "pass seed=, or the framework's own generator as seed=",
    "encoder_outputs": "OPT has no encoder",
    "decoder_input_ids": "OPT has no encoder; input_ids are the prompts",
}
_KNOWN_CODE = ("group-beam-search", "contrastive-search", "constrained-beam-search", "dola")
"""Repositories of `transformers-community` whose search is done here, or refused, by settings."""


class Functions(list[Any]):
    """Functions that are called one after another, as the lists of `transformers` are.

    Args:
        call: Of ids (R, S) and scores (R, V).
    """

    def __init__(self, call: Callable[[Any, Any], Any]) -> None:
        super().__init__([call])

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """The function's result for them."""
        return self[0](input_ids, scores)


def settle_arguments(
    ids_shape: tuple[int, ...], mask: Any, overrides: dict[str, Any], tokenizer: Any, criteria: Any
) -> None:
    """Takes out of the arguments of `generate` what is no setting, or refuses it.

    Args:
        ids_shape: (B, T) of the prompts.
        mask: bool (B, T), False at padding, or None.
        overrides: The arguments; those that are dealt with leave it.
        tokenizer: The tokenizer that was passed, or None.
        criteria: The `stopping_criteria` that were passed, or None.

    Raises:
        GenerationError: One that cannot be honoured.
    """
    for name in _WITHOUT_EFFECT:
        overrides.pop(name, None)
    for name, advice in _REFUSED.items():
        if overrides.pop(name, None) is not None:
            raise GenerationError(f"generate takes no {name}: {advice}")
    if None not in (overrides.get("max_length"), overrides.get("max_new_tokens")):
        notice("max_new_tokens and max_length are both given; max_new_tokens counts")
    _check_positions(ids_shape, mask, overrides.pop("position_ids", None))
    _check_assistants_tokenizer(tokenizer, overrides.pop("assistant_tokenizer", None))
    _check_lengths(overrides.get("max_length"), criteria)


def _check_positions(shape: tuple[int, ...], mask: Any, positions: Any) -> None:
    if positions is None:
        return
    seen = np.ones(shape, bool) if mask is None else np.asarray(mask).astype(bool)
    expected, given = seen.cumsum(1) - 1, np.asarray(positions)
    is_usual = given.shape[-1:] == shape[-1:] and ((given == expected) | ~seen).all()
    if not is_usual:
        raise GenerationError(
            "position_ids: generate counts positions from attention_mask, and received others"
        )


def _check_assistants_tokenizer(tokenizer: Any, other: Any) -> None:
    if other is None:
        return
    if tokenizer is None:
        raise GenerationError("assistant_tokenizer: pass tokenizer= too, to compare them")
    ours, theirs = (as_tokenizer(each).get_vocab() for each in (tokenizer, other))
    if ours != theirs:
        raise GenerationError(
            "assistant_tokenizer: drafts in another vocabulary are not supported; take an assistant"
            " of the same vocabulary"
        )


def _check_lengths(max_length: int | None, criteria: Any) -> None:
    each: Iterable[Any] = cast("Iterable[Any]", criteria) if isinstance(criteria, list) else ()
    for criterion in each:
        other = getattr(criterion, "max_length", None)
        if None not in (max_length, other) and other != max_length:
            raise GenerationError(
                f"stopping_criteria ends at max_length={other}, max_length={max_length} was asked "
                "for; pass one of them"
            )


def prefix_of(model: Any, past: Any) -> Any:
    """A cache that holds the beginning of prompts, whatever kind a caller has; None: an empty one.

    Args:
        model: The language model.
        past: A cache of it, pairs of keys and values for each layer, or a cache of `transformers`,
            which is read and stays as it is.
    """
    if isinstance(past, CacheMixin):
        return past
    if hasattr(past, "layers") and hasattr(past, "get_seq_length"):
        used = int(past.get_seq_length())
        pairs = ((layer.keys, layer.values) for layer in past.layers) if used else ()
        past = tuple((keys[:, :, :used], values[:, :, :used]) for keys, values in pairs)
    if isinstance(past, tuple | list):
        return model.backend.inputs.KVCache.adopt(past, False)
    return past


def check_custom(custom: Any) -> bool:
    """Whether `custom_generate` is a function to call.

    Raises:
        GenerationError: It is a repository, whose code is not run.
    """
    if custom is None or callable(custom):
        return custom is not None
    name = str(custom).removeprefix("transformers-community/")
    if name not in _KNOWN_CODE:
        raise GenerationError(
            f"custom_generate: the code of {custom!r} is not run; pass a function of the model, "
            "input_ids, logits_processor, stopping_criteria and generation_config"
        )
    return False


def call_custom(
    model: Any, request: Any, custom: Callable[..., Any], more: Mapping[str, Any]
) -> Any:
    """Calls a user's own way to generate, as `transformers` does.

    Args:
        model: The language model.
        request: What was asked for.
        custom: Of the model and ids (B, T); `logits_processor` and `stopping_criteria`, which have
            the filters and the ends of this request; `generation_config`; and `more`.
        more: Arguments of `generate` that are no settings.
    """
    prompt, new = request.ids.shape[1], request.new_tokens
    sampling, inputs = model.backend.sampling, model.backend.inputs
    rules, hooks = sampling.request_rules(model, request), request.hooks

    def process(ids: Any, scores: Any) -> Any:
        end = ids.shape[1]
        seen = inputs.to_tensor(model, np.ones((ids.shape[0], end), bool))
        last = end + 1 == prompt + new
        scores = filters.process_logits(
            sampling, scores, ids, seen, end, end - prompt, rules, is_last=last
        )
        return hooks.process(ids, scores)

    def stop(ids: Any, scores: Any) -> Any:
        array = inputs.to_array(ids)
        ended = np.isin(array[:, -1], request.settings.eos_ids) & (array.shape[1] > prompt)
        ended = ended | hooks.stops(ids, scores) | (array.shape[1] >= prompt + new)
        return inputs.to_tensor(model, ended)

    settings = request.settings.replace(max_length=prompt + new)
    mask = inputs.to_tensor(model, request.full_mask().astype(np.int32))
    given = {"attention_mask": mask, **{name: x for name, x in more.items() if x is not None}}
    return custom(
        model, inputs.to_tensor(model, request.ids), logits_processor=Functions(process),
        stopping_criteria=Functions(stop), generation_config=settings, **given,
    )  # fmt: skip
