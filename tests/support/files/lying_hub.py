"""A hub on this machine, which may lie about what it holds."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "c" * 40

Part = Callable[["Handler", bytes, int, int], None]
"""Answers the request for a part of a file, of which all bytes are given."""


class Hub:
    """The repositories, and how much of them was sent."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.parts: dict[str, Part] = {}
        self.about: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self.sent = 0
        self.url = ""


class Handler(BaseHTTPRequestHandler):
    """Speaks the endpoints that huggingface_hub asks."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Quietly."""

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent += len(body)
            self.wfile.write(body)

    def tell(self, values: Any) -> None:
        self.reply(200, json.dumps(values).encode(), Content_Type="application/json")

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].removeprefix("/api/models").strip("/").split("/")
        name = "/".join(parts[:2])
        folder = self.hub.folders.get(name)
        if folder is None:
            return self.reply(404, X_Error_Code="RepoNotFound")
        if parts[2:3] == ["resolve"]:
            return self.send(name, folder.joinpath(*parts[4:]))
        files = [path for path in folder.rglob("*") if path.is_file()]
        sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
        if parts[2:3] == ["tree"]:
            common = {"type": "file", "oid": "x"}
            return self.tell([{**common, "path": p, "size": n} for p, n in sizes.items()])
        siblings = [{"rfilename": path, "size": size} for path, size in sizes.items()]
        info = {"id": name, "sha": COMMIT, "siblings": siblings, "tags": []}
        return self.tell(self.hub.about.get(name, dict)(info))

    def send(self, name: str, path: Path) -> None:
        data = path.read_bytes()
        asked = self.headers.get("Range")
        if not asked:
            return self.reply(200, data, ETag=f'"{path.name}"')
        start, stop = asked.removeprefix("bytes=").split("-")
        return self.hub.parts.get(name, part)(self, data, int(start), int(stop) + 1)

    do_HEAD = do_GET


def part(request: Handler, data: bytes, start: int, stop: int) -> None:
    """The bytes that were asked for."""
    request.reply(206, data[start:stop], ETag='"x"')


def whole(request: Handler, data: bytes, start: int, stop: int) -> None:
    """All of the file, as servers do that do not know ranges."""
    request.reply(200, data, ETag='"x"')


class Server(ThreadingHTTPServer):
    """A server that says nothing when a client that has heard enough hangs up."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Quietly."""


@contextmanager
def serving(handler: type[Handler] = Handler) -> Iterator[Hub]:
    """A hub, until the end of the block."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("Bound", (handler,), {"hub": hub}))
    threading.Thread(target=server.serve_forever, daemon=True, args=(0.01,)).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    yield hub
    server.shutdown()
    server.server_close()
