"""The processor, as the system describes it."""

import platform
from functools import cache
from pathlib import Path

_ABOUT = Path("/proc/cpuinfo")


def maker() -> str:
    """Who made the processor, as it says ("AuthenticAMD"); "" where the system does not tell."""
    # Linux has a line for it; on Windows it ends the processor's name.
    return _line("vendor_id") or platform.processor().rpartition(", ")[2]


def instructions() -> str:
    """The instructions it has, as Linux names them; "" elsewhere."""
    return _line("flags") or _line("Features")


@cache
def _line(name: str) -> str:
    """What Linux says first under a name."""
    try:
        lines = _ABOUT.read_text().splitlines()
    except OSError:  # not Linux
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == name), "")
