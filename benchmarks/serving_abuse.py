"""Does to a server what clients on a bad day do, in numbers, and sees whether it goes on.

python -m benchmarks.serving_abuse --minutes 10

Starts `opt-lm serve mini`. Then come connections that open and do nothing, headers and bodies that
never end, bodies of 100 MB, bodies that are none, and more requests than may wait. Every refusal
must have OpenAI's shape. Then a load of requests, among them clients that go in the middle of a
stream: memory must stay flat. In the end SIGTERM, under load. One JSON line; the exit code is 1 if
anything was not as it must be. Linux.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from opt_cli.serving.connections import files_for

FIELDS: dict[str, Any] = {"model": "mini", "prompt": "ROMEO:", "max_tokens": 30,
                          "logit_bias": {"2": -100}}  # fmt: skip
PATH = "/v1/completions"
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
BAD = [b"", b"[", b"[]", b'"x"', b"{}", b"\xff\xfe", b"[" * 100_000,
       *(json.dumps(FIELDS)[:-1].encode() + b", " + rest + b"}" for rest in (
           b'"temperature": NaN', b'"top_p": Infinity', b'"seed": 1e400', b'"n": -1',
           b'"min_p": "NaN"', b'"stop": [null]', b'"nothing": 1'))]  # fmt: skip


class Found:
    """Answers that came, and faults.

    Attributes:
        statuses: How often each status came, by the kind of request.
        wrong: What was not as it must be.
    """

    def __init__(self) -> None:
        self.statuses: dict[str, Counter[int]] = {}
        self.wrong: list[str] = []

    def note(self, kind: str, answer: httpx.Response, expected: set[int]) -> None:
        """Takes an answer."""
        self.statuses.setdefault(kind, Counter())[answer.status_code] += 1
        try:
            is_shaped = answer.status_code == 200 or set(answer.json()["error"]) == {
                "message", "type", "param", "code"
            }  # fmt: skip
        except (ValueError, KeyError, TypeError):
            is_shaped = False
        if answer.status_code not in expected or not is_shaped:
            self.wrong.append(f"{kind}: {answer.status_code} {answer.text[:100]}")


PATIENCE = 3.0
"""Seconds that a new connection may say nothing before it makes room for others, and some more."""


async def connect(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A bare connection."""
    place = urlsplit(url)
    return await asyncio.open_connection(place.hostname, place.port)


async def silent(url: str, client: httpx.AsyncClient, found: Found, count: int) -> None:
    """Connections that open and do nothing; requests are answered all the while."""
    opened = [await connect(url) for _ in range(count)]
    await asyncio.sleep(PATIENCE)
    for _ in range(20):
        found.note("beside silent ones", await client.post(PATH, json=FIELDS), {200})
    try:
        async with asyncio.timeout(30):
            for reader, _ in opened:
                await reader.read()
    except (TimeoutError, ConnectionError) as error:
        if isinstance(error, TimeoutError):
            found.wrong.append("a silent connection stayed open")
    for _, writer in opened:
        writer.close()


async def halves(url: str, client: httpx.AsyncClient, found: Found, count: int) -> None:
    """Headers and bodies that never end."""
    opened = [await connect(url) for _ in range(count)]
    for i, (_, writer) in enumerate(opened):
        writer.write((HEAD + ("Content-Length: 99\r\n\r\n{" if i % 2 else "X: ")).encode())
    found.note("beside halves", await client.post(PATH, json=FIELDS), {200})
    for reader, writer in opened:
        async with asyncio.timeout(40):
            line = await reader.readline()
        if b" 408 " not in line:
            found.wrong.append(f"half a request: {line!r}")
        writer.close()


async def huge(client: httpx.AsyncClient, found: Found) -> None:
    """Bodies of 100 MB."""

    async def body() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 2**20

    for _ in range(3):
        headers = {"Content-Type": "application/json"}
        found.note("100 MB", await client.post(PATH, content=body(), headers=headers), {413})


async def bad(client: httpx.AsyncClient, found: Found) -> None:
    """Bodies that are none, and settings that are no numbers."""
    for body in BAD:
        headers = {"Content-Type": "application/json"}
        found.note("bad body", await client.post(PATH, content=body, headers=headers), {400})


async def crowd(client: httpx.AsyncClient, found: Found, count: int) -> None:
    """More requests at a time than may wait."""

    async def ask() -> None:
        found.note("crowd", await client.post(PATH, json=FIELDS), {200, 429, 503})

    await asyncio.gather(*(ask() for _ in range(count)))


async def gone(client: httpx.AsyncClient) -> None:
    """A client that goes in the middle of a stream."""
    fields = {**FIELDS, "stream": True, "max_tokens": 200}
    async with client.stream("POST", PATH, json=fields) as stream:
        async for _ in stream.aiter_lines():
            return


async def load(client: httpx.AsyncClient, found: Found, pid: int, seconds: float) -> list[float]:
    """Requests, some of whose clients go; MiB of the server's memory, once in a while."""
    end, memory = time.monotonic() + seconds, list[float]()

    async def ask(source: random.Random) -> None:
        while time.monotonic() < end:
            if source.random() < 0.2:
                await gone(client)
            else:
                prompt = "".join(source.choices("abcdefgh ", k=source.randint(1, 150)))
                fields = {**FIELDS, "prompt": prompt, "max_tokens": source.randint(1, 60)}
                found.note("load", await client.post(PATH, json=fields), {200})

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(min(seconds / 20, 10))
            memory.append(resident(pid))

    await asyncio.gather(watch(), *(ask(random.Random(i)) for i in range(24)))
    return memory


async def stopped(client: httpx.AsyncClient, found: Found, process: Any) -> float:
    """SIGTERM under load: seconds until the server is gone."""
    reading = [asyncio.create_task(last_line(client)) for _ in range(40)]
    await asyncio.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    for each in await asyncio.gather(*reading, return_exceptions=True):
        is_refused = isinstance(each, httpx.ConnectError)
        is_ended = each == "data: [DONE]" or (isinstance(each, str) and '"error"' in each)
        if not (is_refused or is_ended):
            found.wrong.append(f"at SIGTERM: {each!r}")
    code = await asyncio.to_thread(process.wait, 35)
    if code != 0:
        found.wrong.append(f"at SIGTERM: exit code {code}")
    return time.monotonic() - began


async def last_line(client: httpx.AsyncClient) -> str:
    """How a long stream ends."""
    fields, last = {**FIELDS, "stream": True, "max_tokens": 240}, ""
    async with client.stream("POST", PATH, json=fields) as stream:
        async for line in stream.aiter_lines():
            last = line or last
    return last


def resident(pid: int) -> float:
    """MiB of a process' memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


async def run(url: str, process: Any, options: argparse.Namespace) -> dict[str, Any]:
    """All of it."""
    found = Found()
    # A connection that is kept may be closed in the very moment when it is used again.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=120) as client:
        for stage in (
            silent(url, client, found, options.silent),
            halves(url, client, found, options.silent // 10),
            huge(client, found),
            bad(client, found),
            crowd(client, found, options.crowd),
        ):
            began = time.monotonic()
            await stage
            print(f"{stage.__name__}: {time.monotonic() - began:.0f} s", file=sys.stderr)
        memory = await load(client, found, process.pid, 60 * options.minutes)
        files = len(os.listdir(f"/proc/{process.pid}/fd"))
        seconds = await stopped(client, found, process)
    warm = memory[len(memory) // 5 :]  # caches of the allocator are filled before
    return {
        "silent": options.silent, "crowd": options.crowd, "minutes": options.minutes,
        "statuses": {kind: dict(count) for kind, count in found.statuses.items()},
        "memory_mib": [round(warm[0], 1), round(max(warm), 1), round(warm[-1], 1)],
        "growth": round(warm[-1] / warm[0] - 1, 4), "files": files,
        "stop_s": round(seconds, 1), "wrong": sorted(set(found.wrong))[:10],
    }  # fmt: skip


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--silent", type=int, default=5000, help="connections that do nothing")
    parser.add_argument("--crowd", type=int, default=10_000, help="requests at once")
    parser.add_argument("--minutes", type=float, default=10, help="of load")
    parser.add_argument("--backend", default="torch")
    options = parser.parse_args()
    files_for(options.crowd + options.silent)
    command = [sys.executable, "-m", "opt_cli", "serve", "mini", "--port", "0",
               "--backend", options.backend]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        try:
            figures = asyncio.run(run(line.split()[-1], process, options))
        finally:
            process.kill()
        print(process.stderr.read(), file=sys.stderr, end="")
    print(json.dumps(figures))
    sys.exit(bool(figures["wrong"]))


if __name__ == "__main__":
    main()
