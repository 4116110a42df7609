"""Functions that XLA compiles: well, or quickly where there is next to nothing to compute."""

import contextlib
from collections.abc import Callable
from functools import cache, cached_property, update_wrapper
from typing import Any

import jax
from jax.core import Tracer

SMALL = 1 << 20
"""Numbers that go into a program, weights and all, up to which a CPU's is compiled quickly."""

QUICKLY = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}
"""Options that leave out the work of LLVM, most of what compiling a small program takes. What XLA
itself makes of it stays as it is."""


class Program:
    """A function under `jax.jit`.

    Tiny models are made to try something out: compiling took longer than all that their programs
    ever computed.
    """

    def __init__(self, function: Callable[..., Any], **options: Any):
        """Compiles nothing yet; the options are those of `jax.jit`."""
        self._options = options
        self._well: Any = jax.jit(function, **options)
        self.lower = self._well.lower
        update_wrapper(self, function)

    def __call__(self, *args: Any) -> Any:
        """Runs it."""
        return (self._quickly if _is_small(args) else self._well)(*args)

    @cached_property
    def _quickly(self) -> Any:
        function: Any = self.__dict__["__wrapped__"]
        return jax.jit(function, compiler_options=known_options(), **self._options)

    def _cache_size(self) -> int:
        """Programs made so far, named as `jax.jit` has it."""
        return self._well._cache_size() + self._quickly._cache_size()


@cache
def known_options() -> dict[str, Any]:
    """Those of `QUICKLY` that this version of XLA has: it refuses a program with any other."""
    if _is_known(QUICKLY):
        return QUICKLY
    return {name: value for name, value in QUICKLY.items() if _is_known({name: value})}


def _is_known(options: dict[str, Any]) -> bool:
    """Whether XLA takes all of some options."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
        return True
    return False


def _is_small(args: Any) -> bool:
    """Whether a CPU has little to compute; within another program it is not asked."""
    numbers = 0
    for leaf in jax.tree.leaves(args):
        if isinstance(leaf, Tracer):  # whose size need not be a number
            return False
        numbers += getattr(leaf, "size", 0)
        if numbers > SMALL:
            return False
    return jax.default_backend() == "cpu"
