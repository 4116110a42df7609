"""Leads `huggingface_hub`, which reads its settings once, to a server of a test."""

import socket
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import close_session, constants
from huggingface_hub.utils import tqdm


def lead(patch: pytest.MonkeyPatch, url: str, home: Path, offline: bool = False) -> None:
    """Until the patch is undone, the hub is at the URL, and its cache and tokens in `home`.

    Any address but this machine's is refused before it is contacted.
    """
    values = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_OFFLINE": offline,
    }
    for name, value in values.items():
        patch.setattr(constants, name, value)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        patch.delenv(name, raising=False)
    patch.setenv("NO_PROXY", "*")
    close_session()  # it may know a proxy
    # No bars in what a command says.
    patch.setattr(tqdm, "__init__", _without_bar(tqdm.__init__))
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] != "127.0.0.1":
            pytest.exit(f"contacted {address}")
        connect(self, address)

    lookup = socket.getaddrinfo

    def looked_up(host: Any, *rest: Any, **more: Any) -> Any:
        if host not in ("127.0.0.1", b"127.0.0.1"):
            pytest.exit(f"looked up {host}")
        return lookup(host, *rest, **more)

    patch.setattr(socket.socket, "connect", guarded)
    patch.setattr(socket, "getaddrinfo", looked_up)


def _without_bar(start: Any) -> Any:
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **{**kwargs, "disable": True})

    return init
