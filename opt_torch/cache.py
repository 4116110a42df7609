"""The key-value cache: buffers of a fixed size, and positions that follow from what they hold."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from opt_core import inputs as rules
from opt_core.compatibility.caches import WrittenCacheMixin
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.params import POSITION_OFFSET

USED_UP = -1
"""The frontier of a cache whose slots belong to another one."""


@dataclass(frozen=True, repr=False)
class KVCache(WrittenCacheMixin):
    """Keys and values of the tokens seen so far.

    The buffers are written in place and shared between a cache and its successors; `length` says
    how much of them a cache owns. Pass each call the cache that the previous call returned: one
    that was already continued is refused.

    Attributes:
        keys: One (B, H, S, K) buffer per layer.
        values: One (B, H, S, K) buffer per layer.
        length: Slots filled.
        mask: (B, S) bool, True where a filled slot holds a token and False where it holds padding;
            None while no padding was seen.
        grows: Whether it is made larger where it is full; one of `init_cache` is not.
        frontier: The `length` of the newest successor, shared by all of them; `USED_UP` where the
            slots went to a cache that does not share it.
        made: Each layer's keys and values, as they are written, while there are no buffers.
    """

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()
    length: int = 0
    mask: Tensor | None = None
    grows: bool = False
    frontier: list[int] = field(default_factory=list, repr=False, compare=False)
    made: list[tuple[Tensor, Tensor]] = field(default_factory=list, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.frontier:
            self.frontier.append(self.length)

    @property
    def max_length(self) -> int:
        """Slots S there are."""
        return self.keys[0].shape[2] if self.keys else 0

    @property
    def is_empty(self) -> bool:
        """Whether it is known to hold nothing yet."""
        return self.length == 0

    def write(self, layer: int, key_BHTK: Tensor, value_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values behind the present ones.

        Returns:
            All keys and values of the layer so far, (B, H, length + T, K) each.
        """
        if not self.keys:  # nothing is copied before something follows
            self.made.append((key_BHTK, value_BHTK))
            return key_BHTK, value_BHTK
        end = self.length + key_BHTK.shape[2]
        keys, values = self.keys[layer][:, :, :end], self.values[layer][:, :, :end]
        keys[:, :, self.length :] = key_BHTK
        values[:, :, self.length :] = value_BHTK
        return keys, values

    def visible(self, count: int) -> int:
        """Slots to look at with `count` new tokens: the filled ones."""
        return self.filled(count)

    def filled(self, count: int) -> int:
        """Slots filled once `count` more tokens are in."""
        return self.length + count

    def advance(self, count: int, mask_BS: Tensor | None) -> "KVCache":
        """The cache after `count` more tokens.

        Args:
            count: New tokens T.
            mask_BS: bool, False at padding, for the visible slots; None: as this cache knows it,
                no new token is padding.
        """
        length = self.filled(count)
        if self.made:
            keys, values = zip(*self.made, strict=True)
            return KVCache(keys, values, length, mask_BS, grows=True)
        if mask_BS is not None:
            mask_BS = F.pad(mask_BS, (0, self.max_length - length), value=True)
        self.frontier[0] = length
        return replace(self, length=length, mask=self.mask if mask_BS is None else mask_BS)

    def crop(self, length: int) -> "KVCache":
        """Goes back to the first `length` slots: what was behind them is given up.

        Others on the same buffers are used up.

        Args:
            length: How many; less than 0: so many are given up.

        Returns:
            This very cache.

        Raises:
            InputError: There are not so many, or they are no longer this cache's.
        """
        length = rules.cropped_length(length, self.length)
        self.check_intact()
        mask = None if self.mask is None else self.mask.clone()
        if mask is not None:
            mask[:, length:] = True
        self.frontier[0] = USED_UP
        return self.become(replace(self, length=length, mask=mask, frontier=[length]))

    def resize(self, rows: int, max_length: int) -> "KVCache":
        """A cache of other buffers that holds the same, so that one prompt can have many endings.

        Args:
            rows: Rows B of it; a cache of one row is repeated.
            max_length: Slots S of it.

        Raises:
            InputError: The rows or the slots do not fit, or they are no longer this cache's.
        """
        (B, H, _, K), used = self.keys[0].shape, self.length
        rules.check_resize(B, used, rows, max_length)
        self.check_intact()
        buffers = []
        for old in (*self.keys, *self.values):
            new = old.new_zeros(rows, H, max_length, K)
            new[:, :, :used] = old[:, :, :used]
            buffers.append(new)
        mask = self.mask
        if mask is not None:
            free = mask.new_ones(rows, max_length - used)
            mask = torch.cat([mask[:, :used].expand(rows, -1), free], 1)
        N = len(self.keys)
        return KVCache(tuple(buffers[:N]), tuple(buffers[N:]), used, mask)

    def with_room(self, count: int | None) -> "KVCache":
        """See `CacheMixin.with_room`; a larger cache is the only successor there may be."""
        roomy = super().with_room(count)
        if roomy is not self and count is not None:
            self.check_intact(count)
            self.frontier[0] = self.filled(count)
        return roomy

    def _is_writable(self) -> bool:
        # Gradients need what was written; a tensor of inference mode is read-only outside of it.
        lapsed = self.keys[0].is_inference() and not torch.is_inference_mode_enabled()
        return not (lapsed or (torch.is_grad_enabled() and self.keys[0].requires_grad))

    def select(self, rows: Tensor) -> "KVCache":
        """The cache of other rows: `rows[i]` becomes row i, and this cache is used up.

        As many rows as before are moved within the buffers; more or fewer get buffers of their own.

        Args:
            rows: (any,) integer row numbers.
        """
        used = slice(0, self.length)
        mask = None if self.mask is None else self.mask[rows]
        if len(rows) == self.keys[0].shape[0] and not self.grows:
            for buffer in (*self.keys, *self.values):
                buffer[:, :, used] = buffer[rows, :, used]
            self.frontier[0] = USED_UP
            return replace(self, mask=mask, frontier=[self.length])
        keys = tuple(buffer[rows] for buffer in self.keys)
        values = tuple(buffer[rows] for buffer in self.values)
        return KVCache(keys, values, self.length, mask, self.grows)

    def check_intact(self, count: int = 0) -> None:
        """Refuses a cache whose slots were given to another one.

        Args:
            count: Tokens to add; none may be there already.

        Raises:
            InputError: They were.
        """
        newest = self.frontier[0]
        if newest < self.length:
            raise InputError(
                "past_key_values is used up: crop or select gave its slots to another cache; "
                "pass the one that was returned"
            )
        if count and newest > self.length:
            raise InputError(
                f"past_key_values was continued already (it holds {self.length} tokens, its newest "
                f"successor {newest}); pass the one that the last call returned"
            )


def init_cache(
    config: OPTConfig,
    batch_size: int,
    max_length: int,
    dtype: torch.dtype,
    device: torch.device,
    heads: int,
) -> KVCache:
    """An empty cache.

    Args:
        config: The model's configuration.
        batch_size: Rows B.
        max_length: Slots S, for the prompt and everything after it.
        dtype: Type of the keys and values: the model's.
        device: Where the model is.
        heads: Heads H that are computed here: on a mesh not all of them.
    """
    rules.check_cache_size(batch_size, max_length)
    shape = (batch_size, heads, max_length, config.head_dim)
    # Zeros, not empty: a masked slot is multiplied by a zero weight, and 0 * NaN is NaN.
    buffers = [
        torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * config.num_hidden_layers)
    ]
    return KVCache(tuple(buffers[::2]), tuple(buffers[1::2]))


def position_rows(mask_BS: Tensor | None, past: int, count: int, device: torch.device) -> Tensor:
    """Rows of the position table for the newest tokens.

    A token's position is the number of real tokens before it, so padding never shifts one; a padded
    token reads row 1 (transformers' `cumsum(mask) * mask - 1 + 2`).

    Args:
        mask_BS: bool (B, past + count), False at padding; None if there is none.
        past: Tokens already in the cache.
        count: New tokens T.
        device: Where the ids are.

    Returns:
        Row numbers (B, T), or (1, T) without a mask.
    """
    if mask_BS is None:
        start = past + POSITION_OFFSET
        return torch.arange(start, start + count, device=device)[None]
    counts_BS = mask_BS.cumsum(1) * mask_BS
    return counts_BS[:, past:] - 1 + POSITION_OFFSET
