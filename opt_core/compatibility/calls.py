"""Arguments of a model's call that code written for `transformers` passes."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypedDict

from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError, InputError


class CallOptions(TypedDict, total=False):
    """Arguments that every model's call takes beside its own.

    Attributes:
        output_hidden_states: Whether the output has `hidden_states`; None: as configured.
        output_attentions: Whether the output has `attentions`; None: as configured.
        use_cache: Whether the output has a cache, `past_key_values`, that grows as tokens follow;
            None: as `config.use_cache` says, in evaluation, where no program is traced or exported.
            A cache that was passed is returned unless this is False.
        return_dict: False: the output is a tuple of the fields that are there; None: as
            `config.use_return_dict` says.
        head_mask: (N, H), or (H,) for all layers: what each head's weights are multiplied by.
        cache: Another name of `past_key_values`.
        cache_position: (T,) slots of the new tokens; where it can be read, only those that follow
            the cache are accepted.
        num_items_in_batch: With labels, the language model's loss is the sum over the tokens
            divided by this, as gradient accumulation wants it, and not their mean.
        token_type_ids: Without effect, as OPT has no embedding of them.
        decoder_head_mask: None only; it is called `head_mask`.
        encoder_hidden_states: None only: OPT has no encoder.
        encoder_attention_mask: None only: OPT has no encoder.
    """

    output_hidden_states: bool | None
    output_attentions: bool | None
    use_cache: bool | None
    return_dict: bool | None
    head_mask: Any
    cache: Any
    cache_position: Any
    num_items_in_batch: Any
    token_type_ids: Any
    decoder_head_mask: Any
    encoder_hidden_states: Any
    encoder_attention_mask: Any


OPTIONS = tuple(CallOptions.__annotations__)

_OWN = (
    "input_ids", "attention_mask", "position_ids", "inputs_embeds", "past_key_values", "labels",
    "start_positions", "end_positions", "logits_to_keep", "training", "train", "deterministic",
    "dropout_rng",
)  # fmt: skip
"""Arguments that calls have by themselves, for a name that is nearly one."""

_NONE_ONLY = {
    "decoder_head_mask": "use head_mask",
    "encoder_hidden_states": "OPT has no encoder",
    "encoder_attention_mask": "OPT has no encoder",
}


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses arguments that no model has.

    Args:
        options: The arguments that a model's call collected, by name.

    Raises:
        ArgumentError: One of another name, or one that must be None and is not.
    """
    for name, value in options.items():
        if name not in OPTIONS:
            near = get_close_matches(name, (*OPTIONS, *_OWN), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"the model takes no argument {name!r}{hint}")
        if value is not None and name in _NONE_ONLY:
            raise ArgumentError(f"{name}: expected None ({_NONE_ONLY[name]}), received a value")


def check_cache_position(positions: Any, past: Any, count: Any) -> None:
    """Refuses slots other than those behind the cache.

    Args:
        positions: (T,) integers that can be read.
        past: Slots in use.
        count: New tokens T.

    Raises:
        InputError: They are others.
    """
    given, expected = [int(slot) for slot in positions], list(range(past, past + count))
    if given != expected:
        raise InputError(
            f"cache_position: new tokens follow the cache, expected {past}..{past + count - 1}, "
            f"received {given}"
        )


def kept_tokens(logits_to_keep: Any) -> Any:
    """The places of the tokens that logits are wanted of: a slice, or an index as it was given.

    Args:
        logits_to_keep: How many of the last tokens, 0 for all of them, or an index (any,).

    Raises:
        InputError: A number below 0.
    """
    keep: Any = logits_to_keep
    if isinstance(keep, list) or getattr(keep, "ndim", 0) > 0:
        return keep  # pyright: ignore[reportUnknownVariableType]
    if int(logits_to_keep) < 0:
        raise InputError(f"logits_to_keep: expected at least 0, received {logits_to_keep}")
    return slice(-int(logits_to_keep), None)


def each_layers_heads(config: OPTConfig, head_mask: Any) -> list[Any]:
    """A head mask (N, H), or (H,) for all layers, as one (H,) for each layer.

    Raises:
        InputError: It is of another shape.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    shape = tuple(head_mask.shape)
    if shape not in ((heads,), (layers, heads)):
        raise InputError(
            f"head_mask: expected shape ({layers}, {heads}) or ({heads},), received {shape}"
        )
    return [head_mask if len(shape) == 1 else head_mask[i] for i in range(layers)]


def scale_heads(mixed: Any, weights: Any, head_mask: Any) -> tuple[Any, Any]:
    """Each head's sum of the values, and its weights, times its number.

    Args:
        mixed: (B, H, T, K).
        weights: (B, H, T, S), or None.
        head_mask: (H,), or None.
    """
    if head_mask is None:
        return mixed, weights
    heads_H11 = head_mask[:, None, None]
    return mixed * heads_H11, None if weights is None else weights * heads_H11
