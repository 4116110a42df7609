"""Python functions that watch or change a generation, as `transformers` takes them.

They run between the steps of `opt_core.generation.observed`, on tensors of the backend's framework.
"""

import inspect
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import GenerationError


@dataclass(frozen=True)
class Hooks:
    """Functions that a caller gave.

    Attributes:
        logits_processor: A function, or several, of ids (R, S) and scores (R, V), and of the length
            S where it takes three arguments, that returns scores.
        stopping_criteria: A function, or several, of ids (R, S) and scores that returns whether to
            stop, for all rows or for each.
        prefix_allowed_tokens_fn: Of a prompt's number and a row's ids (S,): the ids that may come
            next.
    """

    logits_processor: Any = None
    stopping_criteria: Any = None
    prefix_allowed_tokens_fn: Callable[[int, Any], Any] | None = None

    def __post_init__(self) -> None:
        for name in ("logits_processor", "stopping_criteria"):
            for function in _each(getattr(self, name)):
                if not callable(function):
                    raise GenerationError(
                        f"{name}: expected functions, received {type(function).__name__}"
                    )

    @property
    def is_empty(self) -> bool:
        """Whether there are none."""
        functions = [*_each(self.logits_processor), *_each(self.stopping_criteria)]
        return not functions and self.prefix_allowed_tokens_fn is None

    def process(self, ids_RS: Any, scores_RV: Any) -> Any:
        """The scores as the processors return them."""
        for function in _each(self.logits_processor):
            scores_RV = _call(function, ids_RS, scores_RV)
        return scores_RV

    def allowed(self, ids_RS: Any, copies: int, V: int) -> NDArray[np.float32] | None:
        """(R, V) 0 at ids that may come and -inf elsewhere; None if there is no say in it.

        Raises:
            GenerationError: No id may come in a row.
        """
        if self.prefix_allowed_tokens_fn is None:
            return None
        bias = np.full((len(ids_RS), V), -np.inf, np.float32)
        for row in range(len(ids_RS)):
            prompt = row // copies
            ids = np.asarray(self.prefix_allowed_tokens_fn(prompt, ids_RS[row]), np.int64)
            if not ids.size:
                raise GenerationError(
                    f"prefix_allowed_tokens_fn: no ids for prompt {prompt}; return at least one"
                )
            bias[row, ids] = 0
        return bias

    def stops(self, ids_RS: Any, scores_RV: Any) -> NDArray[np.bool_]:
        """(R,) whether a row is to end."""
        found = np.zeros(len(ids_RS), bool)
        for function in _each(self.stopping_criteria):
            found |= np.asarray(_call(function, ids_RS, scores_RV)).astype(bool)
        return found


class Deadline:
    """The moment after which nothing more is begun.

    Args:
        seconds: From now; None: never.
    """

    def __init__(self, seconds: float | None) -> None:
        self._end = float("inf") if seconds is None else time.monotonic() + seconds

    @property
    def is_over(self) -> bool:
        """Whether it has come."""
        return time.monotonic() > self._end


def _each(functions: Any) -> list[Any]:
    """A function alone, a list of them (`transformers`' are lists that can be called), or none."""
    if functions is None:
        return []
    return list(cast(Iterable[Any], functions)) if isinstance(functions, list) else [functions]


def _call(function: Any, ids_RS: Any, scores_RV: Any) -> Any:
    """Calls it with the length too where it has a place for it, as TensorFlow's and Flax' had."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = inspect.signature(function).parameters.values()
    needed = [p for p in taken if p.kind in kinds and p.default is inspect.Parameter.empty]
    rest = (ids_RS.shape[1],) if len(needed) > 2 else ()
    return function(ids_RS, scores_RV, *rest)


NO_HOOKS = Hooks()
