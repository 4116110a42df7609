"""Caches as code written for `transformers` uses them."""

from collections.abc import Iterator
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any, Self, cast

from opt_core import inputs as rules
from opt_core.compatibility.refusals import refuse_methods
from opt_core.errors import InputError
from opt_core.summaries import describe_fields

FEWEST_SLOTS = 64
"""Slots of a cache that has grown, at least."""


class CacheMixin:
    """Makes a backend's cache one that may grow, and that reads like those of `transformers`.

    As there, `cache[layer]` is the layer's keys and values, (B, H, length, K) each.
    """

    keys: tuple[Any, ...]
    values: tuple[Any, ...]
    grows: bool
    length: Any

    def __repr__(self) -> str:
        fields = {name: getattr(self, name) for name in ("keys", "values", "length", "mask")}
        return describe_fields(type(self).__name__, fields)

    @property
    def known_length(self) -> int | None:
        """Slots filled, where that can be read now."""
        return self.length

    @classmethod
    def adopt(cls, past: Any, starts: bool) -> Self | None:
        """The cache that a call goes on from.

        Args:
            past: What the caller passed: a cache, one pair of keys and values for each layer, or
                None.
            starts: Whether, without one, the call begins a cache that grows.

        Raises:
            InputError: It is something else.
        """
        if past is None or past == ():
            return cls(grows=True) if starts else None  # type: ignore[call-arg]
        kind = type(past).__name__
        if isinstance(past, tuple | list):
            try:
                keys, values = zip(*past, strict=True)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
                length = keys[0].shape[2]
            except (AttributeError, IndexError, TypeError, ValueError):
                raise InputError(
                    "past_key_values: expected a pair of keys and values (B, H, S, K) for each "
                    f"layer, received a {kind} of something else"
                ) from None
            return cls(keys, values, length, grows=True)  # type: ignore[call-arg]
        rules.check_is_cache(past, cls)
        return past

    def with_room(self, count: int | None) -> Self:
        """This cache, or, where it may grow and must, a larger one that holds the same.

        Args:
            count: Tokens T that are to follow; None where that is not known.

        Raises:
            InputError: It must grow within a program that is traced for any length.
        """
        cache: Any = self
        if not self.grows or not self.keys:
            return self
        if cache.known_length is None or count is None:
            raise InputError(
                "past_key_values is a cache that grows, which a compiled program cannot take: pass "
                "one of a fixed size, from init_cache(rows, slots) or resize(rows, slots)"
            )
        needed = cache.filled(count)
        if needed <= cache.max_length and self._is_writable():
            return self
        slots = max(FEWEST_SLOTS, 1 << (needed - 1).bit_length())  # so, few shapes are seen
        return replace(cache.resize(self.keys[0].shape[0], slots), grows=True)

    def growing(self) -> Self:
        """The same tokens, to go on from with any number of others."""
        return replace(cast(Any, self), length=self.known_length, grows=True)

    def _is_writable(self) -> bool:
        """Whether more may be written into these very buffers."""
        return True

    def __len__(self) -> int:
        return len(self.keys)

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, layer: int) -> tuple[Any, Any]:
        """A layer's keys and values, (B, H, length, K) each.

        Raises:
            InputError: The layer is a name.
        """
        if isinstance(layer, str):
            raise InputError(
                f"a cache is indexed by the layer's number, received {layer!r}; keys and values "
                "are cache[layer]"
            )
        used = slice(0, self.length)
        return self.keys[layer][:, :, used], self.values[layer][:, :, used]

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        return (self[layer] for layer in range(len(self)))

    def to_legacy_cache(self) -> tuple[tuple[Any, Any], ...]:
        """Each layer's keys and values, (B, H, length, K)."""
        return tuple(self)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Any = None) -> Self:
        """A cache that grows, of one pair of keys and values (B, H, S, K) for each layer, or empty.

        Raises:
            InputError: It is something else.
        """
        return cast(Self, cls.adopt(past_key_values, starts=True))

    def get_seq_length(self, layer_idx: int = 0) -> Any:
        """Tokens it holds, padding included: as many for each layer."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Slots there are; -1 where the cache grows."""
        cache: Any = self
        return -1 if self.grows else cache.max_length

    def get_max_length(self, layer_idx: int = 0) -> int | None:
        """Slots there are; None where the cache grows."""
        cache: Any = self
        return None if self.grows else cache.max_length

    def get_usable_length(self, new_seq_length: int, layer_idx: int = 0) -> Any:
        """Tokens it holds: none is given up for new ones."""
        return self.length

    @property
    def seen_tokens(self) -> Any:
        """Tokens it holds, as older versions call it."""
        return self.length

    @property
    def layers(self) -> list[SimpleNamespace]:
        """Each layer's `keys` and `values`, (B, H, length, K)."""
        return [SimpleNamespace(keys=keys, values=values) for keys, values in self]

    @property
    def key_cache(self) -> list[Any]:
        """Each layer's keys, (B, H, length, K)."""
        return [keys for keys, _ in self]

    @property
    def value_cache(self) -> list[Any]:
        """Each layer's values, (B, H, length, K)."""
        return [values for _, values in self]


REFUSED = {
    "reorder_cache": "use cache = cache.select(beam_idx)",
    "batch_select_indices": "use cache = cache.select(indices)",
    "batch_repeat_interleave": "use cache = cache.select(rows), each row's number repeated",
    "reset": "begin with another one: init_cache(rows, slots)",
    "update": "the model's call writes it, and returns the next one",
    "offload": "it stays where the model is",
    "prefetch": "it stays where the model is",
    "early_initialization": "use init_cache(rows, slots)",
}
"""Methods of `transformers`' caches that change one in place, and what to do instead."""


# Who ignores what a method returns would not see that nothing changed.
refuse_methods(CacheMixin, REFUSED, InputError, "{name}: a cache is not changed in place; {advice}")


class WrittenCacheMixin(CacheMixin):
    """A cache that is written in place, and changed so too, as those of `transformers` are."""

    def reorder_cache(self, beam_idx: Any) -> None:
        """Makes `beam_idx[i]` row i.

        Args:
            beam_idx: (any,) row numbers.
        """
        if self.keys:
            self.become(cast(Any, self).select(beam_idx))

    def batch_select_indices(self, indices: Any) -> None:
        """Keeps these rows.

        Args:
            indices: (any,) row numbers.
        """
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats each row.

        Args:
            repeats: How often.
        """
        rows = range(self.keys[0].shape[0] * repeats) if self.keys else ()
        self.reorder_cache([row // repeats for row in rows])

    def reset(self) -> None:
        """Forgets all it holds."""
        cast(Any, self).crop(0)

    def become(self, other: Self) -> Self:
        """Takes over what another cache holds; returns itself."""
        for field in fields(cast(Any, self)):
            object.__setattr__(self, field.name, getattr(other, field.name))
        return self
