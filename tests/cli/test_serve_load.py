"""The server under clients that are many, slow, or gone: all by real sockets."""

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

pytest.importorskip("torch")

from opt_cli.serving.command import _GRACE_SECONDS as STOPPED_WITHIN
from tests.support.serving import Limits, Metrics, Server, make_worker, serving, wait_until

FIELDS: dict[str, Any] = {"model": "mini", "prompt": "ROMEO:", "max_tokens": 240, "seed": 1,
                          "logit_bias": {"2": -100}}  # fmt: skip
CONNECTIONS, HEADER_SECONDS, SLOTS, QUEUE = 20, 1.0, 2, 6


@pytest.fixture(scope="module")
def served():
    """A server with tight limits; `gate` keeps its model from going on while it is cleared."""
    metrics = Metrics()
    worker = make_worker(metrics, slots=SLOTS, longest_queue=QUEUE)
    gate, step = threading.Event(), worker.scheduler.step
    gate.set()
    worker.scheduler.step = lambda: (gate.wait(60), step())[1]
    limits = Limits(body_seconds=1)
    with serving(Server([worker], limits, metrics), CONNECTIONS, HEADER_SECONDS) as url:
        yield SimpleNamespace(url=url, worker=worker, gate=gate)
        gate.set()


@pytest.fixture(autouse=True)
def all_is_well_after(served):
    """Whatever was done to it, the server is idle in the end, and answers."""
    yield
    served.gate.set()
    wait_until(lambda: served.worker.scheduler.is_idle and not served.worker.waiting)
    answer = httpx.post(f"{served.url}/v1/completions", json={**FIELDS, "max_tokens": 1})
    assert answer.status_code == 200


def connect(served) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), 30)


def trickle(client: socket.socket, part: bytes) -> None:
    """Sends something now and then until the server has closed the connection."""
    for _ in range(300):
        try:
            client.sendall(part)
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError("the connection stayed open")


def refusal_of(client: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer, which is the last one of its connection."""
    received = b""
    while part := client.recv(10_000):
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return int(head.split()[1]), error


def test_connections_that_say_nothing(served):
    """They make room for others, and are closed in time."""
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(served)) for _ in range(CONNECTIONS)]
        time.sleep(HEADER_SECONDS / 3)
        silent += [stack.enter_context(connect(served)) for _ in range(5)]
        assert httpx.get(f"{served.url}/health").status_code == 200
        assert silent[0].recv(10) == b"", "the oldest made room"
        status, error = refusal_of(silent[-1])
        assert (status, error["message"]) == (408, "no request came within 1 s")


def test_a_crowd_is_answered_or_refused(served):
    """Nobody makes room whose request is only just on its way.

    The last ones find room where the first have gone before the server comes to them.
    """
    with ExitStack() as stack:
        crowd = [stack.enter_context(connect(served)) for _ in range(CONNECTIONS + 5)]
        found = []
        for client in crowd:
            client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        for client in crowd:
            received = b""
            while part := client.recv(10_000):
                received += part
            found.append(received[9:12])
        assert found[:CONNECTIONS] == [b"200"] * CONNECTIONS
        assert {*found[CONNECTIONS:]} <= {b"200", b"503"}


def test_headers_that_never_end(served):
    with connect(served) as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\n")
        began = time.monotonic()
        trickle(slow, b"X-Slow: 1\r\n")
        assert time.monotonic() - began < 4 * HEADER_SECONDS


def test_what_follows_an_answer_has_its_time_too(served):
    """A connection that is kept alive, and a body that goes on after its refusal."""
    with connect(served) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" in client.recv(1000)
        client.sendall(b"GET /hea")
        assert refusal_of(client)[0] == 408
    with connect(served) as client:
        client.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: 500\r\n\r\n{"
        )
        assert b"408" in client.recv(1000)
        began = time.monotonic()
        trickle(client, b" ")
        assert time.monotonic() - began < 4 * HEADER_SECONDS


@pytest.mark.parametrize(
    "sent", [b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET / HTTP/1.1\r\n" + b"a" * 100_000,
             b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"],
    ids=["tls", "long", "twice"],
)  # fmt: skip
def test_what_is_no_http(served, sent):
    with connect(served) as client:
        client.sendall(sent)
        status, error = refusal_of(client)
        assert (status, error["type"]) == (400, "invalid_request_error")


def test_connections_that_are_all_in_use(served):
    """Nobody's answer is cut for another one."""
    served.gate.clear()
    head = (
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 50\r\n\r\n{"
    )
    with ExitStack() as stack:
        busy = [stack.enter_context(connect(served)) for _ in range(CONNECTIONS)]
        for each in busy:
            each.sendall(head)
        time.sleep(0.3)
        with connect(served) as late:
            late.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            status, error = refusal_of(late)
        assert (status, error["code"]) == (503, "too_many_connections")
        assert all(b"408" in each.recv(1000) for each in busy)


def test_more_requests_than_may_wait(served):
    """Streams too are refused before they begin; all others are answered."""
    served.gate.clear()

    def ask(number: int) -> httpx.Response:
        fields = {**FIELDS, "max_tokens": 2, "stream": number % 2 == 0}
        return httpx.post(f"{served.url}/v1/completions", json=fields, timeout=60)

    count = CONNECTIONS - 2
    with ThreadPoolExecutor(count) as pool:
        asked = [pool.submit(ask, number) for number in range(count)]
        wait_until(lambda: sum(each.done() for each in asked) == count - SLOTS - QUEUE)
        served.gate.set()
        answers = [each.result() for each in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == count - SLOTS - QUEUE
    for answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert answer.headers["Retry-After"] == "1"
    assert {answer.status_code for answer in answers} == {200, 429}


def test_clients_that_go_before_their_stream_begins(served):
    served.gate.clear()
    for _ in range(SLOTS + QUEUE):
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{served.url}/v1/completions", json={**FIELDS, "stream": True}, timeout=0.1)
    wait_until(lambda: not served.worker._feeds, 5)
    assert served.worker._rows == 0


IMPATIENT = """
from functools import partial
from opt_cli.main import main
from opt_cli.serving import app
app.Limits = partial(app.Limits, body_seconds=3)
main()
"""
"""`opt-lm`, whose server waits for a body for three seconds."""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
def test_a_server_that_is_stopped_finishes_first():
    """Streams that run and wait are all finished; a body that never comes keeps nobody."""
    assert Limits().body_seconds < STOPPED_WITHIN  # of which it has a shorter one here
    command = [sys.executable, "-c", IMPATIENT, "serve", "mini", "--port", "0", "--slots", "2"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith("serving mini at http://127.0.0.1:"), line
        served = SimpleNamespace(url=line.split()[-1])
        begun = threading.Semaphore(0)

        def read() -> list[str]:
            fields = {**FIELDS, "stream": True, "max_tokens": 100}
            address = f"{served.url}/v1/completions"
            with httpx.stream("POST", address, json=fields, timeout=60) as stream:
                begun.release()
                return [line for line in stream.iter_lines() if line]

        with ThreadPoolExecutor(4) as pool, connect(served) as half:
            half.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Content-Length: 50\r\n\r\n{"
            )
            reading = [pool.submit(read) for _ in range(4)]
            for _ in reading:
                assert begun.acquire(timeout=60)
            process.send_signal(signal.SIGTERM)
            for each in reading:
                assert each.result()[-1] == "data: [DONE]"
            assert b"408" in half.recv(1000)
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
