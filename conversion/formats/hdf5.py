"""Where the datasets of an HDF5 file lie, so that they can be mapped like any other tensor."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import StoredTensor
from opt_core.errors import CheckpointError

_MAGIC = b"\x89HDF\r\n\x1a\n"
_WORKER = Path(__file__).with_name("hdf5_worker.py")
_TIMEOUT = 120.0  # a slow disk may take long; a loop is ended by the worker's own limit
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_DTYPES: dict[str, np.dtype[Any]] = {
    "<f8": np.dtype(np.float64),
    "<f4": np.dtype(np.float32),
    "<f2": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "<i8": np.dtype(np.int64),
    "<i4": np.dtype(np.int32),
}


def require_h5py(path: Path) -> Any:
    """Imports h5py, or says what to install.

    Raises:
        CheckpointError: h5py is not installed.
    """
    if importlib.util.find_spec("h5py") is None:
        raise CheckpointError(f'{path}: .h5 files need h5py: pip install "opt-lm[formats]"')
    return importlib.import_module("h5py")


def read_hdf5(path: Path) -> dict[str, StoredTensor]:
    """Reads which datasets an HDF5 file holds, and where.

    Args:
        path: The file.

    Raises:
        CheckpointError: The file is missing or damaged, links to other places, or holds compressed
            or big-endian data; or h5py is not installed.
    """
    source = TensorFile(path)
    if source.bytes_at(0, len(_MAGIC)) != _MAGIC:
        raise CheckpointError(f"{path}: not an HDF5 file")
    if importlib.util.find_spec("h5py") is None:
        require_h5py(path)
    return {name: _stored(name, entry, source) for name, entry in _listed(path).items()}


def read_hdf5_headers(path: Path, size: int, fetch: Callable[[int, int], bytes]) -> None:
    """Asks for every byte of a file that reading its header takes.

    Args:
        path: Name of the file; it need not exist.
        size: Its bytes.
        fetch: Called with (offset, count). What it raises ends the reading.

    Raises:
        CheckpointError: h5py is not installed.
    """
    require_h5py(path)
    with subprocess.Popen(
        [*_command(path), str(size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **_ONE_THREAD},
    ) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        try:
            while match := re.fullmatch(rb"(\d{1,18}) (\d{1,9})\n", worker.stdout.readline(64)):
                worker.stdin.write(fetch(int(match[1]), int(match[2])))
                worker.stdin.flush()
        except BrokenPipeError:  # it gave up on a damaged file: reading that will tell
            pass
        finally:
            worker.kill()


def _command(path: Path) -> list[str]:
    return [sys.executable, "-P", str(_WORKER), os.path.abspath(path)]


def _listed(path: Path) -> dict[str, Any]:
    try:
        done = subprocess.run(
            _command(path),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_TIMEOUT,
            env={**os.environ, **_ONE_THREAD},
        )
        answer: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
    except (subprocess.TimeoutExpired, ValueError):
        raise CheckpointError(f"{path}: damaged HDF5 file: reading it does not end") from None
    if "datasets" not in answer:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        ended = f"the HDF5 library failed on it (exit code {done.returncode}) {' '.join(last)}"
        raise CheckpointError(f"{path}: damaged HDF5 file: {answer.get('error', ended.strip())}")
    return answer["datasets"]


def _stored(name: str, entry: dict[str, Any], source: TensorFile) -> StoredTensor:
    shape, kind, offset = tuple(entry["shape"]), entry["dtype"], entry["offset"]
    if kind not in _DTYPES:
        raise CheckpointError(
            f"{source.path}: {name!r} has data type {kind}; expected one of {', '.join(_DTYPES)}"
        )
    if offset is None:
        raise CheckpointError(
            f"{source.path}: {name!r} is empty, compressed or in chunks; expected it stored in one "
            "piece, as Keras does"
        )
    return StoredTensor(name, shape, _DTYPES[kind], source, offset)
