"""Connections: those that say nothing make room, and what is no HTTP is refused in shape."""

import asyncio
import json
import selectors
from http import HTTPStatus
from typing import Any

import h11
from starlette.requests import Request
from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from opt_cli.serving import errors
from opt_cli.serving.errors import Refusal

OTHER_FILES = 128
"""Files that a server needs open beside its connections."""


def make_protocol(most: int, header_seconds: float) -> type[H11Protocol]:
    """Uvicorn's protocol with limits.

    Args:
        most: Most connections at a time. One more than that takes the place of the one that has
            been without a request for longest, if that is a quarter of `header_seconds` at least
            and nothing of it waits to be read: a request may be on its way. Otherwise its own are
            refused.
        header_seconds: Most seconds from the first byte of a request, or from its connection, to
            the end of its headers.
    """
    idle = dict[Connection, float]()  # since when, the longest first
    limits = {"most": most, "seconds": header_seconds, "idle": idle}
    return type("Connection", (Connection,), limits)


def files_for(connections: int) -> int:
    """How many connections there can be, once the process may open as many files as it can get."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return connections
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(1, soft - OTHER_FILES)


class Connection(H11Protocol):
    """A connection; `make_protocol` gives it its limits."""

    most: int
    seconds: float
    idle: "dict[Connection, float]"
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begins."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            oldest, since = next(iter(self.idle.items()), (None, 0.0))
            is_new = self.loop.time() - since < self.seconds / 4
            if oldest is None or is_new or oldest.has_unread():
                self.app = _refuse_all
            else:
                oldest.transport.abort()
                self.connections.discard(oldest)
                del self.idle[oldest]
        self._note()

    def connection_lost(self, exc: Exception | None) -> None:
        """Ends."""
        super().connection_lost(exc)
        self.idle.pop(self, None)
        self._stop_timer()

    def has_unread(self) -> bool:
        """Whether its client has sent something that the loop has had no time for."""
        number = self.transport.get_extra_info("socket").fileno()
        if number < 0:  # it is closed
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(number, selectors.EVENT_READ)
            return bool(selector.select(0))

    def data_received(self, data: bytes) -> None:
        """Takes what the client sends."""
        super().data_received(data)
        self._note()

    def on_response_complete(self) -> None:
        """Goes on to the next request."""
        super().on_response_complete()
        # Until something arrives, Uvicorn's own time for connections that are kept alive counts.
        self._note(has_timer=False)

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP."""
        self._refuse(Refusal(msg, None, 400))

    def _note(self, has_timer: bool = True) -> None:
        """Counts the time of a request that is not there yet."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.idle.pop(self, None)
            self._stop_timer()
        elif not self.transport.is_closing():
            self.idle.setdefault(self, self.loop.time())
            if has_timer and self._timer is None:
                self._timer = self.loop.call_later(self.seconds, self._give_up)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        self._refuse(Refusal(f"no request came within {self.seconds:g} s", None, 408))

    def _refuse(self, refusal: Refusal) -> None:
        """Writes a refusal where nothing else is being written, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(refusal.body).encode()
            headers = {"content-type": "application/json", "connection": "close",
                       "content-length": str(len(body))}  # fmt: skip
            reason = HTTPStatus(refusal.status).phrase.encode()
            start = h11.Response(
                status_code=refusal.status, headers=list(headers.items()), reason=reason
            )
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


async def _refuse_all(scope: Scope, receive: Receive, send: Send) -> None:
    refusal = Refusal(
        "there are too many connections; try later", None, 503, "too_many_connections"
    )
    await errors.answer(Request(scope), refusal, {"Connection": "close"})(scope, receive, send)
