"""The machine, as its system describes it: memory that can still be had, and the processor."""

import platform
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
_FILES = {  # of both versions: the limit, what is used, and the names of what the system takes back
    "": ("memory.max", "memory.current", ("active_file", "inactive_file")),
    "memory": (
        "memory.limit_in_bytes", "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
}  # fmt: skip


def available_memory() -> float:
    """Bytes of memory that can still be had; infinite where the system does not say.

    That is the machine's, or what a limit leaves: of a container, a batch system, or systemd
    (Linux' control groups, of either version). Pages of files that the system keeps in free memory
    count as free.
    """
    return min(_machine(), *_left())


def _machine() -> float:
    try:
        lines = (_PROC / "meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    kib = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), "inf")
    return float(kib) * 1024


def _left() -> Iterator[float]:
    """Bytes that the limits of this process' groups, and of the groups around these, leave."""
    yield float("inf")
    try:
        lines = (_PROC / "self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers in _FILES:
            top = _CGROUPS / controllers
            for place in (Path(name), *Path(name).parents):
                yield _left_of(top / str(place).lstrip("/"), *_FILES[controllers])


def _left_of(group: Path, limit: str, used: str, kept: tuple[str, ...]) -> float:
    try:
        most, taken = (float((group / file).read_text().strip()) for file in (limit, used))
        lines = (group / "memory.stat").read_text().splitlines()
    except (OSError, ValueError):  # no such group here, or the limit is "max"
        return float("inf")
    numbers = dict(line.split() for line in lines)
    return max(0.0, most - taken + sum(float(numbers.get(name, 0)) for name in kept))


def maker() -> str:
    """Maker of the processor, as it says ("AuthenticAMD"); "" where the system does not tell."""
    # Linux has a line for it; on Windows it ends the processor's name.
    return _about_processor("vendor_id") or platform.processor().rpartition(", ")[2]


def instructions() -> str:
    """Instructions that the processor has, as Linux names them; "" elsewhere."""
    return _about_processor("flags") or _about_processor("Features")


@cache
def _about_processor(name: str) -> str:
    """First value that Linux gives under a name."""
    try:
        lines = (_PROC / "cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in found if key.strip() == name), "")
