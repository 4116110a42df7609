"""Rules and messages for a model's inputs and caches, on shapes and on values that are known.

A backend makes tensors and reads from them what can be read; what it cannot know while it traces a
program is None here, and fits.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.text.encoding import Rows

NO_TEXT = "a tokenizer makes ids of it: model.generate(**tokenizer(text))"

Shape = Sequence[int | None]


class Range(NamedTuple):
    """The values that an input may have.

    Attributes:
        name: What it is called, for messages.
        values: Its tensor.
        low: The lowest it may have.
        high: The highest.
        why: What says so.
    """

    name: str
    values: Any
    low: int
    high: int
    why: str


def as_row(name: str, values: Any) -> Any:
    """A flat list of ids as the one row that it is; anything else as it is.

    Raises:
        InputError: It is a text, or several.
    """
    if not isinstance(values, list | str):
        return values
    first: Any = values if isinstance(values, str) else next(iter(cast("list[Any]", values)), None)
    if isinstance(first, str):
        raise InputError(f"{name}: expected ids, received text; {NO_TEXT}")
    rows = cast("list[Any]", values)
    return [rows] if isinstance(first, int) else rows


def as_array(values: Any) -> Any:
    """A tokenizer's lists as one padded array; anything else as it is."""
    return np.asarray(values) if isinstance(values, Rows) else values


def check_kind(name: str, is_integer: bool, dtype: object, shape: Shape) -> None:
    """Refuses what is no matrix of integers."""
    if not is_integer or len(shape) != 2:
        raise InputError(
            f"{name}: expected integers of shape (B, T), received {dtype} of shape {tuple(shape)}"
        )


def not_regular(name: str, error: Exception) -> InputError:
    """The error for values that a framework makes no tensor of."""
    reason = str(error).partition("\n")[0]
    return InputError(f"{name}: expected numbers in a regular shape: {reason}")


def check_inputs(
    config: OPTConfig,
    input_ids: Any,
    attention_mask: Any,
    position_ids: Any,
    inputs_embeds: Any,
    cache: Any,
    check_ranges: Callable[[Sequence[Range]], None],
) -> tuple[int | None, int | None]:
    """Refuses inputs that do not fit the model or one another.

    Args:
        config: The model's configuration.
        input_ids: Tensor (B, T), or None.
        attention_mask: Tensor (B, T), or over the slots of a cache: those that are filled then, or
            all; or None.
        position_ids: Tensor (B, T) or (1, T), or None.
        inputs_embeds: Tensor (B, T, P) in place of `input_ids`, or None.
        cache: What came before, or None.
        check_ranges: Refuses values outside of ranges, where they can be looked at.

    Returns:
        Rows B and new tokens T.

    Raises:
        InputError: The first that does not fit, expected and received.
    """
    given = input_ids, attention_mask, position_ids, inputs_embeds
    ids, mask, positions, embeds = (None if x is None else tuple(x.shape) for x in given)
    whole = embeds if ids is None else ids
    if whole is None or (ids is not None and embeds is not None):
        raise InputError("expected either input_ids or inputs_embeds, received both or neither")
    if embeds is not None and (len(embeds) != 3 or embeds[2] != config.embed_dim):
        raise InputError(
            f"inputs_embeds: expected shape (B, T, {config.embed_dim}), received {embeds}"
        )
    B, T = whole[:2]
    if B == 0 or T == 0:
        raise InputError(
            f"the input is empty: expected rows with tokens, received shape ({B}, {T})"
        )
    if positions is not None and not any(_fits(positions, (rows, T)) for rows in (1, B)):
        raise InputError(f"position_ids: expected shape ({B}, {T}), received {positions}")
    if mask is not None:
        slots = T if cache is None or T is None else cache.filled(T)
        every = slots if cache is None or cache.grows else cache.max_length
        if not any(_fits(mask, (B, width)) for width in (T, slots, every)):
            raise InputError(
                f"attention_mask: expected shape ({B}, {T})"
                + (f" or ({B}, {slots})" if slots != T else "")
                + f", received {mask}"
            )
    window, V = config.max_position_embeddings, config.vocab_size
    ranges = (
        Range("input_ids", input_ids, 0, V - 1, f"vocab_size={V}"),
        Range("position_ids", position_ids, -1, window - 1, f"max_position_embeddings={window}"),
        Range("attention_mask", attention_mask, 0, 1, "1 for tokens and 0 for padding"),
    )
    check_ranges([r for r in ranges if r.values is not None])
    return B, T


def _fits(shape: Shape, expected: Shape) -> bool:
    return all(a is None or b is None or a == b for a, b in zip(shape, expected, strict=True))


def check_range(expected: Range, least: int, most: int) -> None:
    """Refuses values outside of a range, by the least and the most of them."""
    name, _, low, high, why = expected
    if least < low or most > high:
        raise InputError(
            f"{name}: expected values in {low}..{high} ({why}), received {least}..{most}"
        )


def check_window(config: OPTConfig, longest: int) -> None:
    """Refuses a sequence of more tokens, padding left out, than the model has positions."""
    window = config.max_position_embeddings
    if longest > window:
        raise InputError(f"a sequence of {longest} tokens exceeds max_position_embeddings={window}")


def check_cache(
    config: OPTConfig,
    dtype: str,
    cache: Any,
    name_type: Callable[[Any], str],
    rows: int | None,
    count: int | None,
    heads: int | None = None,
) -> None:
    """Refuses a cache that another model made, or that is too small.

    Args:
        config: The model's configuration.
        dtype: Type the model computes in.
        cache: A backend's cache.
        name_type: Gives the name of a tensor's type.
        rows: Rows B of the input.
        count: New tokens T.
        heads: Heads that it has here; None: all of the model.
    """
    if not cache.keys:
        return
    held, kept, slots, size = cache.keys[0].shape
    made = (len(cache.keys), kept, size, name_type(cache.keys[0]))
    heads = config.num_attention_heads if heads is None else heads
    expected = (config.num_hidden_layers, heads, config.head_dim, dtype)
    if made != expected:
        raise InputError(
            "past_key_values is of another model: expected (layers, heads, head size, dtype) "
            f"{expected}, received {made}"
        )
    if None not in (rows, held) and held != rows:
        raise InputError(f"past_key_values holds {held} rows, the input has {rows}")
    taken = cache.known_length or 0
    if not (cache.grows or None in (count, slots)) and taken + (count or 0) > slots:
        raise InputError(
            f"past_key_values has {slots} slots; {taken} are taken and {count} more are needed"
        )


def check_is_cache(cache: Any, expected: type) -> None:
    """Refuses what is no cache of the backend."""
    if not isinstance(cache, expected):
        raise InputError(
            f"past_key_values: expected a cache of this model, received {type(cache).__name__}"
        )


def check_prefix(
    cache: Any,
    seen: NDArray[np.bool_] | None,
    ids: NDArray[Any],
    mask: NDArray[np.bool_] | None,
) -> None:
    """Refuses a cache that cannot hold the beginning of some prompts.

    Args:
        cache: A backend's cache, its length known.
        seen: Its mask; None: it holds no padding.
        ids: (B, T) the whole prompts.
        mask: bool (B, T), False at padding; None: nowhere.
    """
    rows, used, (B, T) = cache.keys[0].shape[0], int(cache.length), ids.shape
    if rows not in (1, B):
        raise InputError(f"past_key_values holds {rows} rows, the input has {B}")
    if used >= T:
        raise InputError(
            f"past_key_values holds {used} tokens: expected input_ids that begin with them and go "
            f"on, received {T} tokens"
        )
    nowhere = np.ones((1, used), bool)
    before, given = (nowhere if x is None else x[:, :used] for x in (seen, mask))
    if (before != given).any():
        raise InputError("attention_mask and past_key_values disagree about where padding is")


def check_cache_size(rows: int | None, slots: int | None) -> None:
    """Refuses a new cache without rows or slots."""
    if any(count is not None and count < 1 for count in (rows, slots)):
        raise InputError(f"a cache needs at least 1 row and 1 slot, received {rows} x {slots}")


def cropped_length(length: Any, used: int | None) -> Any:
    """The slots to go back to, of those in use; less than 0 counts from their end.

    Raises:
        InputError: There are not so many.
    """
    if used is None:
        if isinstance(length, int) and length < 0:
            raise InputError(
                f"crop: expected a length of at least 0 in a compiled program, received {length}"
            )
        return length
    if not -used <= length <= used:
        raise InputError(f"crop: expected a length in 0..{used}, received {length}")
    return used + length if length < 0 else length


def check_resize(held: int | None, used: int | None, rows: int, max_length: int) -> None:
    """Refuses rows that are not a cache's own or copies of its only one, and too few slots.

    Args:
        held: Rows the cache has.
        used: Slots in use.
        rows: Rows wanted.
        max_length: Slots wanted.
    """
    if held not in (None, 1, rows) or (used or 0) > max_length:
        raise InputError(
            f"past_key_values holds {held} rows of {used} tokens, the input has {rows} rows and "
            f"there are {max_length} slots"
        )
