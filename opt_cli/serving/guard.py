"""The gate of every request: the key, the count, and headers that keep a page to itself."""

import secrets
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from opt_cli.serving import errors
from opt_cli.serving.errors import Refusal

OPEN = ("/", "/health", "/page/index.html", "/page/page.css", "/page/page.js", "/page/icon.svg")
"""Paths that need no key: they tell nothing."""

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Guard:
    """ASGI middleware.

    Args:
        app: The application.
        key: Bearer token that requests must have; None: none is needed.
        count: A counter of requests by path and status.
    """

    def __init__(self, app: ASGIApp, key: str | None, count: Any) -> None:
        self.app, self.key, self.count = app, key, count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or has it answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                # Paths that nobody serves are one: whoever makes them up fills no memory.
                route = scope.get("route")
                path = getattr(route, "path", None) or "other"
                self.count.labels(path, message["status"]).inc()
            await send(message)

        if self.key is not None and scope["path"] not in OPEN and not self._has_key(scope):
            refusal = Refusal(
                "Authorization: expected the server's key as a bearer token", None, 401,
                "invalid_api_key",
            )  # fmt: skip
            await errors.answer(Request(scope), refusal)(scope, receive, guarded)
        else:
            await self.app(scope, receive, guarded)

    def _has_key(self, scope: Scope) -> bool:
        kind, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
        expected = (self.key or "").encode()
        return kind.lower() == "bearer" and secrets.compare_digest(given.strip().encode(), expected)
