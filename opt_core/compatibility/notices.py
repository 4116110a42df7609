"""Warnings that point at the user's own line, however deep in this library they arise."""

import sys
import warnings

_OURS = {"opt_core", "opt_torch", "opt_tf", "opt_flax", "conversion", "opt_cli"}


def notice(message: str) -> None:
    """Warns at the innermost line of code that is not this project's."""
    level, frame = 1, sys._getframe()  # pyright: ignore[reportPrivateUsage]
    while frame.f_back is not None and _package(frame.f_globals) in _OURS:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _package(names: dict[str, object]) -> str:
    return str(names.get("__name__", "")).partition(".")[0]
