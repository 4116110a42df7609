"""The server's routes: OpenAI's completions, models, tokens, figures, and the page."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from opt_cli.serving import chat, errors
from opt_cli.serving.choices import Choices, Piece, Token, logprobs_of
from opt_cli.serving.errors import Refusal
from opt_cli.serving.fields import Fields, Job, completion_job, encode, read_json
from opt_cli.serving.guard import Guard
from opt_cli.serving.metrics import Metrics
from opt_cli.serving.worker import Worker

PAGE = Path(__file__).parent / "page"


@dataclass(frozen=True)
class Limits:
    """Bounds of every request.

    Attributes:
        body: Most bytes of a body.
        seconds: Most seconds until a request is answered.
        body_seconds: Most seconds until its body is there; less than a server that is told to stop
            waits for it.
        key: Bearer token that requests must have; None: none is needed.
    """

    body: int = 4 << 20
    seconds: float = 600
    body_seconds: float = 15
    key: str | None = None


class Style:
    """How /v1/completions writes its answers."""

    prefix, kind, chunk = "cmpl-", "text_completion", "text_completion"
    make_job = staticmethod(completion_job)

    @staticmethod
    def choice(index: int, text: str, tokens: list[Token] | None, reason: str | None) -> Any:
        """One finished text."""
        logprobs = None if tokens is None else logprobs_of(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    delta = choice
    """A part of one, in a stream."""


class Server:
    """Models and the requests to them.

    Args:
        workers: The models, the first one at the top of the page.
        limits: Bounds of every request.
        metrics: Where figures are kept.
        template: A chat template (`opt_cli.serving.chat`); None: there is no chat.
    """

    def __init__(
        self, workers: Sequence[Worker], limits: Limits, metrics: Metrics,
        template: "chat.Template | None" = None,
    ) -> None:  # fmt: skip
        self.workers = {worker.name: worker for worker in workers}
        self.limits, self.metrics = limits, metrics
        self.styles: Mapping[str, Any] = {"/v1/completions": Style}
        if template is not None:
            self.styles |= {"/v1/chat/completions": chat.Style(template)}
        self.is_stopping = False

    def stop(self) -> None:
        """Takes no further requests; those that run are ended by `cancel`."""
        self.is_stopping = True

    def cancel(self) -> None:
        """Ends what still runs, as an error."""
        for worker in self.workers.values():
            worker.cancel_all("the server is shutting down")

    def app(self) -> Starlette:
        """The ASGI application."""
        post: Any = {"methods": ["POST"]}
        get: Any = {"methods": ["GET"]}
        routes = [
            *(Route(path, partial(self._complete, style), **post)
              for path, style in self.styles.items()),
            Route("/tokenize", self._tokenize, **post),
            Route("/v1/models", self._models, **get),
            Route("/v1/models/{name:path}", self._model, **get),
            Route("/health", self._health, **get),
            Route("/metrics", self._metrics, **get),
            Route("/", partial(_page, PAGE / "index.html"), **get),
            Mount("/page", StaticFiles(directory=PAGE)),
        ]  # fmt: skip
        if "/v1/chat/completions" not in self.styles:
            routes.insert(0, Route("/v1/chat/completions", chat.refuse, **post))
        handlers: dict[Any, Any] = dict.fromkeys((Refusal, HTTPException, Exception), errors.answer)
        guard = Middleware(Guard, key=self.limits.key, count=self.metrics.requests)
        return Starlette(
            routes=routes, exception_handlers=handlers, middleware=[guard], lifespan=self._life
        )

    @asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        for worker in self.workers.values():
            worker.start()
        yield
        for worker in self.workers.values():
            worker.close()

    async def _complete(self, style: Any, request: Request) -> Response:
        worker, fields = await self._read(request)
        job: Job = style.make_job(fields, worker)
        answer = Answer(style, job, worker, self.limits.seconds)
        if job.is_streamed:
            return Stream(answer)
        try:
            return JSONResponse(await _unless_gone(request, answer.whole()))
        finally:
            answer.choices.close()

    async def _tokenize(self, request: Request) -> Response:
        worker, fields = await self._read(request)
        text: Any = fields.take("prompt", str, "a text", "")
        special = fields.take("add_special_tokens", bool, "true or false", True)
        fields.check_rest()
        ids = encode(worker, text, "prompt", special)
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": worker.window})

    async def _read(self, request: Request) -> tuple[Worker, Fields]:
        """The model that a body names, and the other fields."""
        if self.is_stopping:
            raise Refusal("the server is shutting down", None, 503)
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            raise Refusal("Content-Type: expected application/json", None, 415)
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await self._body(request)
        except TimeoutError:
            raise Refusal("the body took too long", None, 408) from None
        except ClientDisconnect:
            raise Refusal("the client is gone", None, 400) from None
        fields = Fields(read_json(body))
        name: Any = fields.take("model", str, "a string")
        if name is None:
            raise Refusal(f"model: expected one of {', '.join(self.workers)}", "model")
        return self._worker(name), fields

    async def _body(self, request: Request) -> bytes:
        """The body; what is too much of it is read and forgotten, so that the answer arrives."""
        body, size = bytearray(), 0
        async for part in request.stream():
            size += len(part)
            if size <= self.limits.body:
                body += part
        if size > self.limits.body:
            raise Refusal(
                f"the body: expected at most {self.limits.body} bytes, received {size}", None, 413
            )
        return bytes(body)

    def _worker(self, name: str) -> Worker:
        if name not in self.workers:
            raise Refusal(
                f"model: expected one of {', '.join(self.workers)}, received {name[:80]!r}",
                "model", 404, "model_not_found",
            )  # fmt: skip
        return self.workers[name]

    async def _models(self, request: Request) -> Response:
        models = [_described(worker) for worker in self.workers.values()]
        return JSONResponse({"object": "list", "data": models})

    async def _model(self, request: Request) -> Response:
        return JSONResponse(_described(self._worker(request.path_params["name"])))

    async def _health(self, request: Request) -> Response:
        failed = [worker.name for worker in self.workers.values() if worker.failure]
        if failed or self.is_stopping:
            raise Refusal(f"failed: {', '.join(failed)}" if failed else "stopping", None, 503)
        return JSONResponse({"status": "ok"})

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=self.metrics.content_type)


class Stream(StreamingResponse):
    """An answer as server-sent events; its rows end with it, whether or not they were begun."""

    def __init__(self, answer: "Answer") -> None:
        super().__init__(
            answer.stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.choices.close()


class Answer:
    """The answer to a request, whole or as a stream; its rows wait from now on.

    Args:
        style: How it is written.
        job: The request.
        worker: Its model.
        seconds: Most seconds it may take.
    """

    def __init__(self, style: Any, job: Job, worker: Worker, seconds: float) -> None:
        self.style, self.job, self.seconds = style, job, seconds
        self.choices = Choices(job, worker)
        self.frame = {
            "id": style.prefix + secrets.token_hex(12), "created": int(time.time()),
            "model": worker.name,
        }  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        """The response's object, once everything is written."""
        pieces: list[list[Piece]] = [[] for _ in self.job.rows]
        async for piece in self._pieces():
            pieces[piece.index].append(piece)
        choices = [
            self.style.choice(i, "".join(p.text for p in each), self._tokens(each),
                              each[-1].finish_reason)
            for i, each in enumerate(pieces)
        ]  # fmt: skip
        return {
            **self.frame, "object": self.style.kind, "choices": choices,
            "usage": self.choices.usage,
        }  # fmt: skip

    async def stream(self) -> AsyncIterator[str]:
        """Server-sent events: an object for each piece, then [DONE]."""
        frame = {**self.frame, "object": self.style.chunk}
        try:
            async for piece in self._pieces():
                if not (piece.text or piece.tokens or piece.finish_reason):
                    continue  # inside a character, or what may become a stop string
                delta = self.style.delta(
                    piece.index, piece.text, self._tokens([piece]), piece.finish_reason
                )
                yield _event({**frame, "choices": [delta]})
            if self.job.has_usage:
                yield _event({**frame, "choices": [], "usage": self.choices.usage})
        except Refusal as refusal:  # the status is sent already
            yield _event(refusal.body)
            return
        yield "data: [DONE]\n\n"

    async def _pieces(self) -> AsyncGenerator[Piece]:
        try:
            async with asyncio.timeout(self.seconds), aclosing(self.choices.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        except TimeoutError:
            raise Refusal(
                f"the answer took more than {self.seconds:g} s", None, 504, "request_timeout"
            ) from None

    def _tokens(self, pieces: list[Piece]) -> list[Token] | None:
        if self.job.logprobs is None:
            return None
        return [token for piece in pieces for token in piece.tokens]


async def _page(file: Path, request: Request) -> Response:
    return FileResponse(file)


async def _unless_gone(request: Request, work: Any) -> Any:
    """The result of some work, which ends where its client is gone."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.25)

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait([task, watcher], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Refusal("the client is gone", None, 400)
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


def _event(values: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(values)}\n\n"


def _described(worker: Worker) -> dict[str, Any]:
    return {
        "id": worker.name, "object": "model", "created": worker.created, "owned_by": "opt-lm",
        "max_model_len": worker.window, "backend": worker.backend,
    }  # fmt: skip
