"""A server in a thread of the test's process."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn

from opt_cli.backends import load_backend
from opt_cli.serving.app import Limits, Server
from opt_cli.serving.connections import make_protocol
from opt_cli.serving.metrics import Metrics
from opt_cli.serving.worker import Worker
from opt_core import OPTTokenizer
from opt_core.hub import resolve

LONGEST_WAIT = 60


def make_worker(
    metrics: Metrics, model: Any = "mini", name: str = "mini", backend: str = "torch",
    slots: int = 4, longest_queue: int = 8,
) -> Worker:  # fmt: skip
    """A model to serve."""
    path = resolve(model)
    made = load_backend(backend).from_pretrained(path)
    tokenizer = OPTTokenizer.from_pretrained(path)
    return Worker(name, made, tokenizer, backend, slots, longest_queue, metrics)


@contextmanager
def serving(server: Server, connections: int = 4096, header_seconds: float = 10) -> Iterator[str]:
    """Serves at a free port; yields the address, and stops in the end."""
    config = uvicorn.Config(
        server.app(), port=0, log_level="warning", access_log=False, ws="none",
        http=make_protocol(connections, header_seconds), timeout_graceful_shutdown=5,
    )  # fmt: skip
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    wait_until(lambda: running.started or not thread.is_alive())
    try:
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.cancel()
        running.should_exit = True
        thread.join(LONGEST_WAIT)
        assert not thread.is_alive()


def wait_until(is_so: Any, seconds: float = LONGEST_WAIT) -> None:
    """Waits until something is so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.01)


def write_template(folder: Path) -> Path:
    """A chat template of two lines."""
    path = folder / "chat.jinja"
    path.write_text(
        "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ bos_token if loop.first }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return path


__all__ = ["Limits", "Metrics", "Server", "make_worker", "serving", "wait_until", "write_template"]
