"""Programs of several processes that find one another as those of torchrun do."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.support.processes.hosts import Host

ROOT = Path(__file__).parents[2]


class Rank(NamedTuple):
    """How a process ended.

    Attributes:
        code: Its exit code; negative: the signal that ended it.
        told: All that it wrote.
    """

    code: int
    told: str


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    module: str, count: int, arguments: list[str], out: Path, limit: int = 500,
    disturb: Callable[[list[subprocess.Popen[bytes]]], None] | None = None,
    hosts: Sequence[Host] = (Host(),),
) -> list[Rank]:  # fmt: skip
    """Starts a program once for each rank, and waits until all have ended.

    Args:
        module: What Python runs.
        count: Number of processes.
        arguments: Of each of them; "{rank}" in one becomes the process' number.
        out: Folder for what they write.
        limit: Seconds after which those that still run are killed.
        disturb: Called with the processes once they run.
        hosts: Where they run, in turn.
    """
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count),
        "MASTER_ADDR": hosts[0].address, "MASTER_PORT": str(free_port()), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    logs = [out / f"log{rank}" for rank in range(count)]
    processes: list[subprocess.Popen[bytes]] = []
    deadline = time.monotonic() + limit
    try:
        for rank, log in enumerate(logs):
            host = hosts[rank % len(hosts)]
            environment = {
                **common, "RANK": str(rank), "LOCAL_RANK": str(rank),
                "GLOO_SOCKET_IFNAME": host.interface,
            }  # fmt: skip
            own = [argument.replace("{rank}", str(rank)) for argument in arguments]
            with log.open("w") as file:
                command = [*host.prefix, sys.executable, "-m", module, *own]
                processes.append(
                    subprocess.Popen(
                        command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )
        if disturb is not None:
            disturb(processes)
        for process in processes:
            process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass  # their exit codes say it
    finally:
        for process in processes:
            process.kill()
    codes = [process.wait() for process in processes]
    return [Rank(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]
