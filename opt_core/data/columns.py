"""Rows of files that keep a table by its columns: Parquet, and Arrow as `datasets` writes it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from opt_core.errors import DataError

_INSTALL = 'pip install "opt-lm[data]"'


def import_optional(name: str, path: Path) -> Any:
    """A library that few files need.

    Raises:
        DataError: It is not installed.
    """
    try:
        return __import__(name, fromlist=["*"])
    except ModuleNotFoundError:
        package = name.partition(".")[0]
        raise DataError(f"{path}: needs {package}, which is not installed: {_INSTALL}") from None


def parquet_rows(
    path: Path, columns: list[str] | None, progress: Callable[[int], None] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a Parquet file; arguments as in `opt_core.data.readers.read_rows`."""
    parquet, arrow = import_optional("pyarrow.parquet", path), import_optional("pyarrow", path)
    count, size = 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024, columns=columns):
                for row in batch.to_pylist():
                    count += 1
                    yield f"{path}:{count}", row
                if progress:
                    progress(size * count // max(1, file.metadata.num_rows))
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged, or no Parquet file: {reason}") from None


def arrow_rows(
    path: Path, columns: list[str] | None, progress: Callable[[int], None] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a stream of Arrow's, as `datasets` writes, mapped and not read as a whole."""
    arrow = import_optional("pyarrow", path)
    ipc = import_optional("pyarrow.ipc", path)
    count = 0
    try:
        with arrow.memory_map(str(path)) as file, ipc.open_stream(file) as stream:
            _check_columns(path, columns, stream.schema.names)
            for batch in stream:
                chosen = batch if columns is None else batch.select(columns)
                for start in range(0, chosen.num_rows, 1024):
                    for row in chosen.slice(start, 1024).to_pylist():
                        count += 1
                        yield f"{path}:{count}", row
                if progress:
                    progress(file.tell())
    except (arrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: damaged, or no stream of Arrow's: {reason}") from None


def _check_columns(path: Path, columns: list[str] | None, names: list[str]) -> None:
    missing = [name for name in columns or () if name not in names]
    if missing:
        there = ", ".join(map(repr, names))
        raise DataError(f"{path}: expected a column {missing[0]!r}, found {there}")
