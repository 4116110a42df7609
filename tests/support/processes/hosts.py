"""Two hosts on one machine: network namespaces where the user may make them, else addresses."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Host(NamedTuple):
    """Where a program runs.

    Attributes:
        prefix: Command line in front of the program's.
        address: At which other hosts find it.
        interface: Network interface of that address.
    """

    prefix: tuple[str, ...] = ()
    address: str = "127.0.0.1"
    interface: str = "lo"


@contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Makes two hosts that see one another, each with a network of its own."""
    names = [f"opt{os.getpid() % 100000}{side}" for side in "ab"]
    if not _can_make(names):
        yield [Host((), "127.0.0.2"), Host((), "127.0.0.3")]
        return
    addresses = ["10.77.0.1", "10.77.0.2"]
    try:
        _ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address in zip(names, addresses, strict=True):
            _ip("link", "set", name, "netns", name)
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", name)
            _ip("-n", name, "link", "set", name, "up")
            _ip("-n", name, "link", "set", "lo", "up")
        prefix = ("ip", "netns", "exec")
        yield [Host((*prefix, n), a, n) for n, a in zip(names, addresses, strict=True)]
    finally:
        for name in names:  # their interfaces go with them
            _ip("netns", "delete", name)


def _can_make(names: list[str]) -> bool:
    if os.geteuid() or not shutil.which("ip"):
        return False
    made = [name for name in names if not _ip("netns", "add", name, is_sure=False)]
    if len(made) < len(names):
        for name in made:
            _ip("netns", "delete", name)
    return len(made) == len(names)


def _ip(*arguments: str, is_sure: bool = True) -> int:
    return subprocess.run(["ip", *arguments], check=is_sure, capture_output=True).returncode
