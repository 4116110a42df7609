"""Models that the tests of a module share."""

from collections.abc import Callable
from typing import Any

import pytest

from opt_core.params import Head
from tests.support.backends import Backend


@pytest.fixture(scope="module")
def loaded() -> dict[Any, Any]:
    """The models of `load`, by all that distinguishes them."""
    return {}


@pytest.fixture
def load(
    backend: Backend, folder: Callable[..., Any], loaded: dict[Any, Any],
    request: pytest.FixtureRequest,
) -> Callable[..., Any]:  # fmt: skip
    """`backend.load(folder(config), head)`, once for all tests of the module.

    With a model they share the programs that were traced for it, so no test may change one. A test
    that XLA compiles has programs, and so models, of its own.
    """
    is_xla = request.node.get_closest_marker("xla") is not None

    def load(config: Any, head: Head = "causal_lm", seed: int = 0, **options: Any) -> Any:
        key = (backend.name, is_xla, config, head, seed, *sorted(options.items()))
        if key not in loaded:
            loaded[key] = backend.load(folder(config, head, seed), head, **options)
        return loaded[key]

    return load
