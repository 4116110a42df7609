"""Refusals in the shape of OpenAI's API, which its clients turn into exceptions."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

_KINDS = {
    401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "timeout_error",
}  # fmt: skip


class Refusal(Exception):
    """An answer that is an error.

    Args:
        message: The reason, one line.
        param: The field that it is about.
        status: HTTP's status code.
        code: A word for programs.
    """

    def __init__(
        self, message: str, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code

    @property
    def body(self) -> dict[str, Any]:
        """The error as OpenAI's API writes it."""
        kind = _KINDS.get(self.status, "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def answer(
    request: Request, error: Exception, headers: Mapping[str, str] | None = None
) -> Response:
    """The response for a refusal, for Starlette's own errors, and for whatever else goes wrong."""
    if isinstance(error, HTTPException):
        headers = error.headers
        error = Refusal(f"{request.method} {request.url.path}: {error.detail}", None,
                        error.status_code)  # fmt: skip
    elif not isinstance(error, Refusal):
        error = Refusal("the server failed; its log says how", None, 500)
    if error.status == 429:
        headers = {"Retry-After": "1"}
    # In ASCII: what a client sent may be no text, and is repeated all the same.
    return Response(json.dumps(error.body), error.status, headers, "application/json")
