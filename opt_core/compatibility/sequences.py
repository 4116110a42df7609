"""Results that are arrays here, and objects that have that array in `transformers` and in Keras."""

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import AbsentError


class Sequences:
    """Ids of `generate`, (R, T + new): an array that has itself as `sequences`.

    The functions of `transformers`' Flax models returned an object, ours return the ids. This is
    both: NumPy's and `jax.numpy`'s functions take it for the array, and so do operators, indices
    and attributes; `sequences`, or `["sequences"]`, is the framework's own array.
    """

    __slots__ = ("sequences",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, sequences: Any):
        """Wraps ids, or whatever takes their place where a tree is rebuilt."""
        self.sequences = sequences

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "sequences":
            raise AttributeError(name)
        if name in ("scores", "logits", "attentions", "hidden_states", "sequences_scores"):
            raise AbsentError(
                f"{name}: generate kept none; pass return_dict_in_generate=True and "
                f"output_{'scores' if 'scores' in name else name}=True"
            )
        return getattr(self.sequences, name)

    def __getitem__(self, key: Any) -> Any:
        """A part of the ids, or the ids by their name."""
        return getattr(self, key) if isinstance(key, str) else self.sequences[key]

    def keys(self) -> tuple[str, ...]:
        """The name of the ids."""
        return ("sequences",)

    def replace(self, sequences: Any) -> "Sequences":
        """Other ids in their place."""
        return type(self)(sequences)

    def to_tuple(self) -> tuple[Any, ...]:
        """The ids alone, as an output without scores gives them."""
        return (self.sequences,)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        return np.array(self.sequences, dtype=dtype, copy=copy)

    def __jax_array__(self) -> Any:
        return self.sequences

    def __len__(self) -> int:
        return len(self.sequences)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.sequences)

    def __bool__(self) -> bool:
        return bool(self.sequences)

    def __repr__(self) -> str:
        return repr(self.sequences)


class Predictions(np.ndarray):
    """A result of Keras' `predict`, an array that has itself under the output's name.

    `transformers`' models returned an output of arrays: `logits` here, or `last_hidden_state` of a
    model without a head, as an attribute or by name. It is a plain array otherwise.
    """

    field: str = "logits"

    def __array_finalize__(self, obj: Any) -> None:
        self.field = getattr(obj, "field", "logits")

    def __getitem__(self, key: Any) -> Any:
        """A part of the array, or all of it by its name."""
        return getattr(self, key) if isinstance(key, str) else super().__getitem__(key)

    def __getattr__(self, name: str) -> Any:
        if name == self.field:
            return np.asarray(self)
        if name in ("logits", "last_hidden_state", "hidden_states", "attentions", "loss"):
            raise AbsentError(
                f"predict returns {self.field} alone; call the model, a batch at a time, for {name}"
            )
        raise AttributeError(f"an array has no attribute {name!r}")

    @classmethod
    def of(cls, values: Any, field: str) -> "Predictions":
        """An array with a name for itself."""
        found = np.asarray(values).view(cls)
        found.field = field
        return found


def _delegate(name: str) -> Callable[..., Any]:
    is_reverse = name in _REVERSED
    function: Any = getattr(operator, f"__{name[is_reverse:]}__")

    def method(self: Sequences, *others: Any) -> Any:
        values = [self.sequences, *(getattr(x, "sequences", x) for x in others)]
        return function(*(reversed(values) if is_reverse else values))

    return method


class PredictedSpans(NamedTuple):
    """The result of Keras' `predict` of question answering.

    Attributes:
        start_logits: (B, T).
        end_logits: (B, T).
    """

    start_logits: NDArray[Any]
    end_logits: NDArray[Any]

    def __getitem__(self, key: Any) -> Any:
        """One of the two, by number or by name."""
        values: tuple[Any, ...] = tuple(self)
        return getattr(self, key) if isinstance(key, str) else values[key]


_BINARY = ("add", "sub", "mul", "floordiv", "truediv", "mod", "and", "or", "xor", "lshift", "pow")
_REVERSED = tuple(f"r{name}" for name in _BINARY)
_OTHERS = ("rshift", "eq", "ne", "lt", "le", "gt", "ge", "neg", "pos", "abs", "invert")
for _name in (*_BINARY, *_REVERSED, *_OTHERS):
    setattr(Sequences, f"__{_name}__", _delegate(_name))
