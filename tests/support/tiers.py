"""Two tiers of tests: `make test` runs a few cases of each claim, `make test-all` every one."""

from collections.abc import Callable, Iterable
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
