"""`opt-lm serve`: models behind HTTP, as OpenAI's clients speak it, and a page to try them on."""

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opt_cli import console
from opt_cli.backends import AUTO, chosen, load_backend
from opt_core.errors import ConfigError

if TYPE_CHECKING:
    from opt_cli.serving.app import Server

_MODEL, _LIMITS = "Model", "Limits"
_HEADER_SECONDS = 10
"""Seconds that a connection has to send the headers of a request."""
_GRACE_SECONDS = 20
"""Seconds that what runs has to end in, once the server is told to stop."""


def _option(help: str, metavar: str, panel: str | None = None) -> Any:
    return typer.Option(help=help, metavar=metavar, rich_help_panel=panel)


def serve(
    model: Annotated[
        list[str],
        typer.Argument(help='Folders, hub ids, or "mini"; the page compares two.', metavar="MODEL"),
    ],
    host: Annotated[str, _option("Address to listen on.", "NAME")] = "127.0.0.1",
    port: Annotated[int, _option("Port to listen on; 0: any free one.", "N")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Bearer token that requests must have.", metavar="TEXT", envvar="OPT_API_KEY"
        ),
    ] = None,
    chat_template: Annotated[
        Path | None, _option("Jinja template that makes chats of completions.", "FILE")
    ] = None,
    backend: Annotated[
        list[str] | None,
        _option("torch, tf or flax; may be repeated: each serves each model.", "NAME", _MODEL),
    ] = None,
    dtype: Annotated[
        str, _option("float32, bfloat16, float16; auto: as stored.", "NAME", _MODEL)
    ] = "float32",
    quantize: Annotated[
        str | None, _option("Keep the weights as int8 or int4: less memory.", "NAME", _MODEL)
    ] = None,
    device: Annotated[
        str | None, _option('Device of the torch backend, such as "cuda".', "NAME", _MODEL)
    ] = None,
    mesh: Annotated[
        str | None, _option('Flax: devices by axis, such as "data=2,model=4".', "TEXT", _MODEL)
    ] = None,
    adapter: Annotated[
        str | None, _option("PEFT adapter to merge: folder or hub id.", "MODEL", _MODEL)
    ] = None,
    revision: Annotated[
        str | None, _option("Branch, tag or commit of a hub id.", "NAME", _MODEL)
    ] = None,
    slots: Annotated[int, _option("Texts that are written at a time.", "N", _LIMITS)] = 16,
    queue: Annotated[int, _option("Most texts that wait for a slot.", "N", _LIMITS)] = 256,
    timeout: Annotated[float, _option("Most seconds of a request.", "X", _LIMITS)] = 600,
    max_body: Annotated[float, _option("Most MiB of a request.", "X", _LIMITS)] = 4,
    connections: Annotated[int, _option("Most connections at a time.", "N", _LIMITS)] = 4096,
) -> None:
    """Serve models to OpenAI's clients, and a page to try them on.

    opt-lm serve facebook/opt-125m --port 8000

    Texts enter and leave a batch at any step, and each is what opt-lm generate writes alone.
    Control-C, or SIGTERM, lets what runs finish first.
    """
    for name, value in {"slots": slots, "connections": connections}.items():
        if value < 1:
            raise ConfigError(f"{console.option(name)}: expected at least 1, received {value}")
    if not 0 <= port <= 65535:
        raise ConfigError(f"--port: expected 0..65535, received {port}")
    try:
        from opt_cli.serving import app
        from opt_cli.serving.chat import Template
        from opt_cli.serving.metrics import Metrics
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'opt-lm serve needs {error.name}, which is not installed: pip install "opt-lm[serve]"'
        ) from None
    template = None if chat_template is None else Template(chat_template)
    metrics, options = Metrics(), {"dtype": dtype, "quantize": quantize}
    names = [chosen(name) for name in backend or [AUTO]]
    for name in names:
        if device is not None and name != "torch":
            raise ConfigError(f"--device is for torch; {name} places its arrays itself")
        if mesh is not None and name != "flax":
            raise ConfigError(f"--mesh is for flax, received the backend {name}")
    workers = [
        _load(one, name, len(names) > 1, adapter, revision,
              options | _placement(device, mesh), slots, queue, metrics)
        for one in model
        for name in names
    ]  # fmt: skip
    twice = [w.name for i, w in enumerate(workers) if w.name in [v.name for v in workers[:i]]]
    if twice:
        raise ConfigError(f"{twice[0]} is given twice")
    limits = app.Limits(int(max_body * 2**20), timeout, key=api_key)
    _run(app.Server(workers, limits, metrics, template), host, port, connections)


def _placement(device: str | None, mesh: str | None) -> dict[str, Any]:
    if mesh is None:
        return {} if device is None else {"device": device}
    from opt_flax.sharding import AXES, make_mesh

    sizes: Any = {}
    for part in mesh.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdecimal():
            raise ConfigError(f'--mesh: expected axes such as "data=2,model=4", received {mesh!r}')
        sizes[axis] = int(size)
    return {"mesh": make_mesh(**sizes)}


def _load(
    model: str, backend: str, is_named: bool, adapter: str | None, revision: str | None,
    options: dict[str, Any], slots: int, queue: int, metrics: Any,
) -> Any:  # fmt: skip
    from opt_cli.serving.worker import Worker
    from opt_core import OPTTokenizer
    from opt_core.adapters.folders import tokenizer_folder
    from opt_core.hub import resolve

    path = resolve(model, revision=revision)
    tokenizer = OPTTokenizer.from_pretrained(tokenizer_folder(path, adapter))
    with console.progress(f"loading {model}") as progress, console.notices("offload: "):
        made = load_backend(backend).from_pretrained(
            path, progress=progress, adapter=adapter, offload="auto", **options
        )
    name = f"{model}@{backend}" if is_named else model
    worker = Worker(name, made, tokenizer, backend, slots, queue, metrics)
    with console.progress(f"compiling for {name}"):
        worker.scheduler.warm_up()
    return worker


def _run(server: "Server", host: str, port: int, connections: int) -> None:
    import uvicorn

    from opt_cli.serving.connections import files_for, make_protocol

    class Uvicorn(uvicorn.Server):
        """Tells the application when it is told to stop, and where it listens."""

        def handle_exit(self, sig: int, frame: Any) -> None:
            server.stop()
            super().handle_exit(sig, frame)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for each in self.servers:
                place = each.sockets[0].getsockname()
                name = f"[{place[0]}]" if ":" in place[0] else place[0]
                console.note(f"serving {', '.join(server.workers)} at http://{name}:{place[1]}")

        async def shutdown(self, sockets: Any = None) -> None:
            import asyncio

            asyncio.get_running_loop().call_later(_GRACE_SECONDS, server.cancel)
            await super().shutdown(sockets)

    # Uvicorn raises the signal once more when all is done; that the server stopped is a success.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: None)
    config = uvicorn.Config(
        server.app(), host, port, log_level="error", access_log=False, ws="none",
        http=make_protocol(files_for(connections), _HEADER_SECONDS), server_header=False,
        timeout_graceful_shutdown=_GRACE_SECONDS + 5,
    )  # fmt: skip
    Uvicorn(config).run()
