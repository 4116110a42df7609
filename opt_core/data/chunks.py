"""Cleans and tokenises documents, a chunk of them at a time, in one process or several."""

import signal
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, NamedTuple

from opt_core.data.cleaning import Cleaning, clean, length_problem
from opt_core.data.deduplication import Fingerprints, fingerprints
from opt_core.data.readers import Document
from opt_core.data.tokenization import BulkTokenizer
from opt_core.errors import DataError
from opt_core.text.tokenizer import OPTTokenizer

Chunk = list[tuple[int, Document]]
"""Documents, each with the number of its source."""


class ChunkResult(NamedTuple):
    """A processed chunk: a value per document, or one in all.

    Attributes:
        problems: Why a document is to be dropped; None: it is not.
        ids: Its tokens, as bytes of `dtype`.
        fingerprints: What tells duplicates.
        dtype: Type of an id.
        removed: Characters removed.
        sizes: Bytes of each text as it was read, in UTF-8.
    """

    problems: list[str | None]
    ids: list[bytes]
    fingerprints: Fingerprints
    dtype: str
    removed: int
    sizes: list[int]


class Workers(NamedTuple):
    """Workers that process chunks.

    Attributes:
        submit: Gives the texts of a chunk to a worker; it returns at once.
        result: Waits for what `submit` began.
        waiting: Chunks that are worth beginning before the first is waited for.
    """

    submit: Callable[[list[str]], Any]
    result: Callable[[Any], ChunkResult]
    waiting: int


class ChunkWorker:
    """Cleans and tokenises chunks; every process has one.

    Args:
        tokenizer: Makes the ids.
        cleaning: What to change and what to drop.
    """

    current: "ChunkWorker"

    def __init__(self, tokenizer: OPTTokenizer, cleaning: Cleaning) -> None:
        self._tokenize, self._cleaning = BulkTokenizer(tokenizer), cleaning

    def __call__(self, texts: list[str]) -> ChunkResult:
        """Processes the texts of a chunk."""
        cleaned = [clean(text, self._cleaning) for text in texts]
        problems = [length_problem(text, self._cleaning) for text, _ in cleaned]
        found = fingerprints([text for text, _ in cleaned])
        for i, share in enumerate(found.repetition):
            if problems[i] is None and share > self._cleaning.max_repetition:
                problems[i] = "repetitive"
        ids = [
            self._tokenize(text) if problem is None else b""
            for (text, _), problem in zip(cleaned, problems, strict=True)
        ]
        removed = sum(count for _, count in cleaned)
        sizes = [len(text.encode(errors="surrogatepass")) for text in texts]
        return ChunkResult(problems, ids, found, self._tokenize.dtype.str, removed, sizes)


def process_chunks(
    chunks: Iterator[Chunk], workers: Workers
) -> Iterator[tuple[Chunk, ChunkResult]]:
    """Each chunk with what became of it, in order."""
    begun: deque[tuple[Chunk, Any]] = deque()
    for chunk in chunks:
        begun.append((chunk, workers.submit([document.text for _, document in chunk])))
        if len(begun) > workers.waiting:  # enough to keep them busy, and no more in memory
            first, handle = begun.popleft()
            yield first, workers.result(handle)
    for first, handle in begun:
        yield first, workers.result(handle)


@contextmanager
def open_processes(
    tokenizer: OPTTokenizer, cleaning: Cleaning, processes: int
) -> Generator[Workers]:
    """So many processes of this machine; one is this one.

    Raises:
        DataError: A worker process ended.
    """
    if processes == 1:
        yield Workers(ChunkWorker(tokenizer, cleaning), _as_it_is, 0)
        return
    context = get_context("spawn")
    pool = ProcessPoolExecutor(processes, context, _start_worker, (tokenizer, cleaning))

    def submit(texts: list[str]) -> Future[ChunkResult]:
        return pool.submit(_process_chunk, texts)

    try:
        yield Workers(submit, Future[ChunkResult].result, 2 * processes)
    except BrokenProcessPool:
        raise DataError(
            "a worker process ended by itself, perhaps for lack of memory; try fewer processes"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _as_it_is(result: ChunkResult) -> ChunkResult:
    return result


def _start_worker(tokenizer: OPTTokenizer, cleaning: Cleaning) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends its workers
    ChunkWorker.current = ChunkWorker(tokenizer, cleaning)


def _process_chunk(texts: list[str]) -> ChunkResult:
    return ChunkWorker.current(texts)
