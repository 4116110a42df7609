"""Two tiers of tests: `make test` runs a few cases of each claim, `make test-all` every one.

What decides: a case is slow where a fast one fails too, whatever line is broken for both. A product
of settings that know nothing of one another is fast along its edges, each setting once. What every
layer does alike is shown on one layer, unless layers can be mixed up (forward passes, caches, names
of weights). What runs in another process is fast where the process is the point.

Compiling is what takes time. TensorFlow's graphs run without XLA unless a test is marked `xla`.
Files marked `dealt` test what is core's, or the same claim by many cases: there each case runs in
PyTorch and in one of the compiled backends, in turn, from the fifth case on every other one of
them; and in the slow tier in all.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def tiered(cases: Iterable[Any], is_fast: Callable[..., bool]) -> list[Any]:
    """The cases of `parametrize`, those marked slow that only repeat what others show.

    Args:
        cases: Values of one argument, or tuples of several.
        is_fast: Called with a case's values; whether `make test` runs it.
    """
    every = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [pytest.param(*case, marks=() if is_fast(*case) else pytest.mark.slow) for case in every]


MANY = 4
"""Cases of a test that each have a compiled backend; of more than that, every other one has."""


def deal(items: Sequence[pytest.Item], backends: Sequence[str]) -> None:
    """Marks as slow what of the `dealt` tests another compiled backend runs.

    Args:
        items: All tests that were collected.
        backends: Names of those that are tested; with one compiled backend, it has all cases.
    """
    if not {"tf", "flax"} <= {*backends}:
        return
    seen: Counter[tuple[str, str]] = Counter()
    order: dict[str, int] = {}
    for item in items:
        values = getattr(item, "callspec", None)
        backend = values.params.get("backend") if values else None
        if backend in ("tf", "flax") and item.get_closest_marker("dealt"):
            name = item.nodeid.partition("[")[0]
            # Tests of a single case go to one and the other in turn.
            count = seen[name, backend]
            number = count + order.setdefault(name, len(order))
            seen[name, backend] += 1
            is_left_out = count >= MANY and count % 4 > 1
            if is_left_out or (number % 2 == 0) != (backend == "tf"):
                item.add_marker(pytest.mark.slow)
