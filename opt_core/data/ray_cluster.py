"""Cleans and tokenises chunks of documents on the machines of a Ray cluster.

This process reads the files, looks for duplicates and writes; the cluster does what takes the time.
A chunk whose worker or machine is lost is done again elsewhere.
"""

from collections.abc import Generator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from opt_core.data.chunks import ChunkResult, ChunkWorker, Workers
from opt_core.data.cleaning import Cleaning
from opt_core.errors import DataError
from opt_core.text.tokenizer import OPTTokenizer

_workers: dict[str, ChunkWorker] = {}
"""The worker that a process of the cluster has made, by the object that it was made of."""


@contextmanager
def open_cluster(tokenizer: OPTTokenizer, cleaning: Cleaning) -> Generator[Workers]:
    """All processors of a cluster: RAY_ADDRESS', or this machine's, or one that is started for it.

    Raises:
        DataError: Ray is not installed, or there is no such cluster.
    """
    try:
        ray: Any = import_module("ray")
    except ImportError:
        raise DataError('engine: "ray" needs Ray: pip install "opt-lm[ray]"') from None
    was_there = ray.is_initialized()
    if not was_there:
        try:
            ray.init(logging_level="error", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise DataError(f"engine: Ray has no cluster for this process: {reason}") from None
    try:
        # Lost machines are no fault of a chunk's, however many they are.
        task = ray.remote(num_cpus=1, max_retries=-1)(_process)
        made_of = ray.put((tokenizer, cleaning))
        processors = int(ray.cluster_resources().get("CPU", 1))

        def result(handle: Any) -> ChunkResult:
            try:
                return ray.get(handle)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None

        def submit(texts: list[str]) -> Any:
            return task.remote([made_of], texts)  # in a list: a worker fetches it once

        yield Workers(submit, result, 2 * processors)
    finally:
        if not was_there:
            ray.shutdown()


def _process(made_of: list[Any], texts: list[str]) -> ChunkResult:
    name = made_of[0].hex()
    if name not in _workers:
        _workers.clear()
        _workers[name] = ChunkWorker(*import_module("ray").get(made_of[0]))
    return _workers[name](texts)
