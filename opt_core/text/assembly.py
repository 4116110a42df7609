"""From encoded texts to rows: special tokens, pairs, truncation, padding.

The tokenizer's library does the first three; it is given a tokenizer without a vocabulary, made for
the call, so that nothing of the real one changes and threads may share it.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from opt_core.errors import TokenizerError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from tokenizers.processors import PostProcessor

PADDING = {True: "longest", False: None, None: None, "do_not_pad": None} | {
    name: name for name in ("longest", "max_length")
}
TRUNCATION = {True: "longest_first", False: None, None: None, "do_not_truncate": None} | {
    name: name for name in ("longest_first", "only_first", "only_second")
}
NO_LIMIT = int(1e30)
"""`model_max_length` of a tokenizer whose files name none."""
NO_PAD_TOKEN = (
    "texts of different lengths need a pad_token, which this tokenizer lacks; set one "
    "(tokenizer.pad_token = tokenizer.eos_token) or add one (tokenizer.add_special_tokens)"
)
_FILLS = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}


def begin_with(token: str, token_id: int) -> "PostProcessor":
    """Puts a token before each text, before both of a pair."""
    from tokenizers.processors import TemplateProcessing

    name = token if re.fullmatch(r"[^$:\s]+", token) else "[BOS]"  # what a template can spell
    special: Any = {"id": name, "ids": [token_id], "tokens": [token]}
    return TemplateProcessing(
        single=f"{name} $A", pair=f"{name} $A {name}:1 $B:1", special_tokens=[special]
    )


def choice(name: str, value: Any, choices: Mapping[Any, str | None]) -> str | None:
    """One of the values an argument may have, in any of its spellings.

    Raises:
        TokenizerError: It is another one.
    """
    value = getattr(value, "value", value)
    if value not in choices:
        known = ", ".join(repr(x) for x in choices if x is not None)
        raise TokenizerError(f"{name}: expected one of {known}, received {value!r}")
    return choices[value]


def side(name: str, value: Any) -> str:
    """Checks a side.

    Raises:
        TokenizerError: It is neither "left" nor "right".
    """
    if value not in ("left", "right"):
        raise TokenizerError(f'{name}: expected "left" or "right", received {value!r}')
    return value


@dataclass(frozen=True)
class Limits:
    """How long rows may and must be.

    Attributes:
        truncation: Which text is cut, "longest_first", "only_first" or "only_second"; None: none.
        padding: "longest", "max_length" or None.
        max_length: Tokens of a row, special ones included; None where nothing needs it.
        stride: Tokens that a cut-off part repeats.
    """

    truncation: str | None
    padding: str | None
    max_length: int | None
    stride: int


def limits(
    padding: Any, truncation: Any, max_length: int | None, stride: int, longest: int
) -> Limits:
    """Reads the arguments that decide lengths, as `transformers` does.

    `max_length` alone cuts; without it, a model's greatest length is taken where one is known.

    Args:
        padding: One of `PADDING`.
        truncation: One of `TRUNCATION`.
        max_length: Tokens of a row, or None.
        stride: Tokens that a cut-off part repeats.
        longest: The model's own limit, `NO_LIMIT` where there is none.

    Raises:
        TokenizerError: A value that is none of those, or a length that is none.
    """
    pad = choice("padding", padding, PADDING)
    cut = choice("truncation", truncation, TRUNCATION)
    if max_length is not None and truncation is None and pad is None:
        cut = "longest_first"
    for name, number, least in (("max_length", max_length, 1), ("stride", stride, 0)):
        if number is not None and (type(number) is not int or number < least):
            raise TokenizerError(f"{name}: expected at least {least}, received {number!r}")
    if max_length is None and (cut or pad == "max_length"):
        if longest < NO_LIMIT:
            max_length = longest
        else:
            given = "truncation" if cut else "padding"
            warnings.warn(
                f"{given} without max_length changes nothing: this tokenizer knows no length of "
                "its own; pass max_length",
                stacklevel=4,
            )
            cut, pad = None, None if pad == "max_length" else pad
    return Limits(cut, pad, max_length, stride)


def check_multiple(limits: Limits, multiple: int | None) -> None:
    """Refuses rows that are cut to a length and then padded beyond it.

    Raises:
        TokenizerError: They would be.
    """
    longest = limits.max_length
    if multiple and longest and limits.truncation and limits.padding and longest % multiple:
        raise TokenizerError(
            f"pad_to_multiple_of={multiple}: rows are cut to max_length={longest}, which is no "
            "multiple of it; pass one that is"
        )


def assemble(
    firsts: "Sequence[Encoding]",
    seconds: "Sequence[Encoding] | None",
    begin: tuple[str, int] | None,
    limits: Limits,
    cut_side: str,
) -> "list[list[Encoding]]":
    """Rows of one or two texts, special tokens in their places, cut to their length.

    Args:
        firsts: The encoded texts.
        seconds: As many second ones, or None.
        begin: The token before each text and its id; None: there is none.
        limits: How long a row may be.
        cut_side: Where a text is cut, "left" or "right".

    Returns:
        For each pair its row, and what was cut off, in rows as well.

    Raises:
        TokenizerError: Texts cannot be cut as asked.
    """
    from tokenizers import Tokenizer, models

    blank: Any = Tokenizer(models.BPE())
    if begin is not None:
        blank.post_processor = begin_with(*begin)
    rows: list[list[Encoding]] = []
    for i, first in enumerate(firsts):
        second = None if seconds is None else seconds[i]
        if limits.truncation is not None:
            _truncate(blank, limits, cut_side, begin is not None, second is not None)
        try:
            row = blank.post_process(first, second, begin is not None)
        except Exception as error:  # the library raises nothing narrower
            raise TokenizerError(
                f"text {i}: cannot be cut to max_length={limits.max_length} by "
                f"truncation={limits.truncation!r}: {error}"
            ) from None
        rows.append([row, *row.overflowing])
    return rows


def _truncate(blank: Any, limits: Limits, cut_side: str, has_begin: bool, is_pair: bool) -> None:
    most, strategy = limits.max_length or 0, limits.truncation
    room = most - has_begin * (1 + is_pair)
    if is_pair and strategy == "longest_first":
        room //= 2
    if room < 0 or (limits.stride and limits.stride >= room):
        raise TokenizerError(
            f"max_length={most} leaves {max(room, 0)} tokens for a text; expected more than "
            f"stride={limits.stride}"
        )
    blank.enable_truncation(most, stride=limits.stride, strategy=strategy, direction=cut_side)


def columns(rows: "list[Encoding]", **wanted: bool) -> dict[str, list[Any]]:
    """By name what each row has: ids, and what else is wanted.

    Args:
        rows: The library's.
        **wanted: "token_type_ids", "attention_mask", "special_tokens_mask", "offset_mapping".
    """
    fields = {
        "input_ids": "ids",
        "token_type_ids": "type_ids",
        "attention_mask": "attention_mask",
        "special_tokens_mask": "special_tokens_mask",
        "offset_mapping": "offsets",
    }
    return {
        name: [getattr(row, field) for row in rows]
        for name, field in fields.items()
        if wanted.get(name, True)
    }


def fills(pad_id: int | None) -> dict[str, int | None]:
    """Ids and numbers that padding is made of, by the name of what is padded."""
    return {"input_ids": pad_id, **_FILLS}


def pad(
    rows: "list[Encoding]",
    token: str | None,
    pad_id: int | None,
    limits: Limits,
    multiple: int | None,
    padding_side: str,
) -> None:
    """Fills rows up to one length, in place.

    Args:
        rows: The library's.
        token: The padding token, or None.
        pad_id: Its id.
        limits: How long a row must be.
        multiple: What its length must be a multiple of, or None.
        padding_side: "left" or "right".

    Raises:
        TokenizerError: There is something to fill up, and no padding token.
    """
    width = _width([row.ids for row in rows], pad_id, limits, multiple)
    filling: dict[str, Any] = {"pad_id": pad_id or 0, "pad_token": token or ""}
    for row in cast("list[Any]", rows):
        row.pad(width, direction=padding_side, **filling)


def padded(
    made: Mapping[str, list[Any]],
    pad_id: int | None,
    limits: Limits,
    multiple: int | None,
    padding_side: str,
) -> dict[str, list[Any]]:
    """Rows filled up to one length, those of the columns that can be.

    Args:
        made: By name, a list for each row.
        pad_id: Id of the padding token, or None.
        limits: How long a row must be.
        multiple: What its length must be a multiple of, or None.
        padding_side: "left" or "right".

    Raises:
        TokenizerError: There is something to fill up, and no padding token.
    """
    width = _width(made["input_ids"], pad_id, limits, multiple)
    values = fills(pad_id)

    def filled(row: list[Any], fill: Any) -> list[Any]:
        extra = [fill] * (width - len(row))
        return [*extra, *row] if padding_side == "left" else [*row, *extra]

    return {
        name: [filled(row, values[name]) for row in column] if name in values else column
        for name, column in made.items()
    }


def _width(rows: list[list[int]], pad_id: int | None, limits: Limits, multiple: int | None) -> int:
    width = max(map(len, rows), default=0)
    if limits.padding == "max_length":
        width = limits.max_length or 0  # longer rows stay as they are
    width += -width % multiple if multiple else 0
    if pad_id is None and any(len(row) < width for row in rows):
        raise TokenizerError(NO_PAD_TOKEN)
    return width
