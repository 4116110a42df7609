"""The layer for code written for `transformers`: what PyTorch has to do for it."""

from typing import Any

from torch import Tensor

from opt_core.compatibility.caches import CacheMixin
from opt_core.errors import InputError


class AdoptedCache(CacheMixin):
    """A `DynamicCache` of `transformers` in the place of a `KVCache`: it is filled as it is there.

    Such a cache knows no padding: each call's mask covers all tokens.
    """

    mask = None

    def __init__(self, cache: Any):
        self.cache, self.grows = cache, True
        self.length = int(cache.get_seq_length())

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """One (B, H, S, K) tensor per layer; none while it is empty."""
        return tuple(layer.keys for layer in self.cache.layers) if self.length else ()

    def filled(self, count: int) -> int:
        """Slots filled once `count` more tokens are in."""
        return self.length + count

    def with_room(self, count: int) -> "AdoptedCache":
        """Itself: each layer grows as it is written."""
        return self

    def check_intact(self, count: int = 0) -> None:
        """Accepts it: its owner sees every change."""

    def write(self, layer: int, key_BHTK: Tensor, value_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values; returns all of them, (B, H, length + T, K)."""
        return self.cache.update(key_BHTK, value_BHTK, layer)

    def advance(self, count: int, mask_BS: Tensor | None) -> Any:
        """The caller's own cache, which holds the new tokens now."""
        return self.cache


def adopt_cache(past: Any) -> AdoptedCache | None:
    """A cache of `transformers` made usable; None for anything else.

    Raises:
        InputError: It is one of a fixed size, which returns slots that hold nothing.
    """
    if not (hasattr(past, "layers") and hasattr(past, "get_seq_length")):
        return None
    kind = type(past).__name__
    if kind != "DynamicCache":
        raise InputError(
            f"past_key_values: expected a DynamicCache or one of init_cache, received a {kind}"
        )
    return AdoptedCache(past)
