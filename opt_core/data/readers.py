"""Reads documents and rows from the files people keep text in.

Text (.txt, .text, .md), JSON lines (.jsonl, .ndjson, .json), tables (.csv, .tsv), Parquet, and the
folders that `save_to_disk` of `datasets` writes (.arrow); all but the last two also as .gz or .zst.
Everything is UTF-8. What cannot be read is an error that names the file and the place in it, or,
where the caller wants that, one more document dropped.
"""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from opt_core.data.columns import arrow_rows, import_optional, parquet_rows
from opt_core.errors import DataError
from opt_core.json_files import parse_json, parse_json_object

TEXT, LINES, TABLE, PARQUET, ARROW = "text", "lines", "table", "parquet", "arrow"
_KINDS = {
    **dict.fromkeys((".txt", ".text", ".md"), TEXT),
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), LINES),
    **dict.fromkeys((".csv", ".tsv"), TABLE),
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
_COMPRESSIONS = (".gz", ".zst")
_PIECE = 1 << 20
_STATE_FILE = "state.json"
"""Beside the .arrow files of a `datasets` folder; it names those that belong to it."""
_ABOUT_FILES = (_STATE_FILE, "dataset_info.json", "dataset_dict.json")

OnBadData = Callable[[str, str, str], None]
"""A handler of what cannot be read: called with its place, a short reason, and what is wrong."""


class Document(NamedTuple):
    """One text and where it was found, such as "corpus.jsonl:12"."""

    text: str
    place: str


def refuse(place: str, reason: str, message: str) -> None:
    """The strict way to treat what cannot be read.

    Raises:
        DataError: Always.
    """
    raise DataError(f"{place}: {message}")


def find_files(paths: Iterable[str | PathLike[str]]) -> list[Path]:
    """The files to read: those named, and those of a known kind below the folders named, sorted.

    Raises:
        DataError: A path does not exist, is of no known kind, or a folder holds no such file.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and _is_data(p))
            if not inside:
                raise DataError(f"{path}: holds no file of a known kind ({', '.join(_KINDS)})")
            found += inside
        elif not path.exists():
            raise DataError(f"{path}: no such file or folder")
        elif not _kind(path):
            raise DataError(
                f"{path}: expected a name that ends in {', '.join(_KINDS)}, or one of these and "
                f"{' or '.join(_COMPRESSIONS)}"
            )
        else:
            found.append(path)
    return found


def read_documents(
    path: Path,
    text_field: str = "text",
    separator: str | None = None,
    on_bad: OnBadData = refuse,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Document]:
    """The documents of one file, in order.

    Args:
        path: A file of a known kind.
        text_field: Where the text is in JSON lines and tables.
        separator: What separates the documents of a text file; None: each file is one.
        on_bad: What to do with a document that cannot be read.
        progress: Called with the bytes of the file that have been read.
    """
    if _kind(path) == TEXT:
        yield from _text_documents(path, separator, on_bad, progress)
        return
    for place, row in read_rows(path, on_bad, progress, columns=[text_field]):
        text = row.get(text_field)
        if isinstance(text, str):
            yield Document(text, place)
        elif text_field in row:
            kind = type(text).__name__
            on_bad(place, "no text", f"{text_field!r}: expected a string, found {kind}")
        else:
            there = ", ".join(map(repr, row)) or "nothing"
            on_bad(place, "no text", f"expected a field {text_field!r}, found {there}")


def read_rows(
    path: str | PathLike[str],
    on_bad: OnBadData = refuse,
    progress: Callable[[int], None] | None = None,
    columns: list[str] | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of JSON lines, a JSON list, a table, or a Parquet or Arrow file, with their places.

    Args:
        path: A file of a known kind; a text file has no rows.
        on_bad: What to do with a row that cannot be read.
        progress: Called with the bytes of the file that have been read.
        columns: All that is wanted of a Parquet or Arrow file.
    """
    path = find_files([path])[0] if not Path(path).is_dir() else Path(path)
    kind = _kind(path)
    if kind == PARQUET:
        yield from parquet_rows(path, columns, progress)
    elif kind == ARROW:
        yield from arrow_rows(path, columns, progress)
    elif kind == LINES:
        yield from _json_rows(path, on_bad, progress)
    elif kind == TABLE:
        yield from _table_rows(path, on_bad, progress)
    else:
        raise DataError(f"{path}: expected rows (JSON lines, a table or Parquet), not text")


def read_text(path: str | PathLike[str]) -> str:
    """A whole text file, line ends as line feeds.

    Raises:
        DataError: It is missing, empty, binary or not UTF-8.
    """
    (document,) = read_documents(find_files([path])[0])
    return document.text


def read_json_data(path: str | PathLike[str]) -> Any:
    """A whole JSON file, compressed or not.

    Raises:
        DataError: It is missing, empty, not UTF-8 or not JSON.
    """
    path = Path(path)
    with _open_stream(path, None) as stream:
        data = stream.read()
    return parse_json(_decode(data, str(path), refuse) or "", path, DataError)


def _is_data(path: Path) -> bool:
    """Whether a file below a folder is of a known kind, and not about a `datasets` folder."""
    state = path.parent / _STATE_FILE
    if path.suffix == ".arrow" and state.exists():  # others are caches
        listed = parse_json_object(state.read_bytes(), state, DataError).get("_data_files")
        return {"filename": path.name} in listed if isinstance(listed, list) else False
    if path.name in _ABOUT_FILES and (state.exists() or (path.parent / _ABOUT_FILES[2]).exists()):
        return False
    return _kind(path) is not None


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return None if kind in (PARQUET, ARROW) else kind
    return _KINDS.get(suffixes[-1]) if suffixes else None


@contextmanager
def _open_stream(path: Path, progress: Callable[[int], None] | None) -> Generator[IO[bytes]]:
    """The bytes of a file, decompressed; whatever goes wrong with them is a `DataError`."""
    suffix = path.suffix.lower()
    damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    try:
        with open(path, "rb") as file:
            if suffix == ".gz":
                stream: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=file))
            elif suffix == ".zst":
                zstandard = import_optional("zstandard", path)
                damaged = (*damaged, zstandard.ZstdError)
                reader = zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True)
                stream = cast("IO[bytes]", io.BufferedReader(reader))
            else:
                stream = file
            yield cast("IO[bytes]", _ProgressStream(stream, file, progress)) if progress else stream
    except damaged as error:
        raise DataError(f"{path}: damaged {suffix[1:]} data: {error}") from None
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise DataError(f"{path}: no such file or folder") from None
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None


class _ProgressStream:
    """A stream that tells how far its file has been read."""

    def __init__(self, stream: IO[bytes], file: IO[bytes], progress: Callable[[int], None]):
        self._stream, self._file, self._progress = stream, file, progress
        self._reported = 0

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(size)
        self._progress(self._file.tell())
        return data

    def __iter__(self) -> Iterator[bytes]:
        for line in self._stream:
            if self._file.tell() - self._reported > _PIECE:
                self._reported = self._file.tell()
                self._progress(self._reported)
            yield line


def _decode(data: bytes, place: str, on_bad: OnBadData) -> str | None:
    """The text, or None where it is not UTF-8 and `on_bad` accepted that."""
    try:
        return data.removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        on_bad(place, "not UTF-8", _not_utf8(data, error.start, error.start))
        return None


def _not_utf8(data: bytes, index: int, offset: int) -> str:
    if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "is UTF-16; convert it to UTF-8"
    if b"\0" in data:
        return f"binary data, not text (byte {data.index(0) + offset - index} is zero)"
    return f"byte {offset} (0x{data[index]:02x}) is not UTF-8; convert the text to UTF-8"


def _text_documents(
    path: Path, separator: str | None, on_bad: OnBadData, progress: Callable[[int], None] | None
) -> Iterator[Document]:
    decoder = io.IncrementalNewlineDecoder(
        codecs.getincrementaldecoder("utf-8-sig")(), translate=True
    )
    held, count, offset = "", 0, 0
    with _open_stream(path, progress) as stream:
        while True:
            data = stream.read(_PIECE if separator else -1)
            pending = len(decoder.getstate()[0])
            try:
                held += decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                message = _not_utf8(error.object, error.start, offset - pending + error.start)
                on_bad(str(path), "not UTF-8", message)
                return
            if "\0" in held:
                on_bad(str(path), "binary", f"binary data, not text (a zero byte after {offset})")
                return
            offset += len(data)
            if not data:
                break
            if separator:
                *whole, held = held.split(separator)
                for text in whole:
                    count += 1
                    yield Document(text, f"{path}:{count}")
    if held.strip() or not count:
        if not offset:
            on_bad(str(path), "empty file", "is empty")
            return
        yield Document(held, f"{path}:{count + 1}" if separator else str(path))


def _json_rows(
    path: Path, on_bad: OnBadData, progress: Callable[[int], None] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with _open_stream(path, progress) as stream:
        for number, line in enumerate(stream, 1):
            place = f"{path}:{number}"
            if not line.strip():
                continue
            if number == 1 and line.lstrip(codecs.BOM_UTF8)[:1] == b"[":
                break
            text = _decode(line, place, on_bad)
            if text is None:
                continue
            try:
                row: Any = json.loads(text)
            except (ValueError, RecursionError) as error:
                if "\0" in text:
                    on_bad(place, "binary", "binary data, not JSON")
                else:
                    on_bad(place, "not JSON", f"not valid JSON: {error}")
                continue
            if isinstance(row, dict):
                yield place, cast("dict[str, Any]", row)
            else:
                on_bad(place, "not JSON", f"expected a JSON object, found {type(row).__name__}")
        else:
            if not number:
                on_bad(str(path), "empty file", "is empty")
            return
    rows: Any = read_json_data(path)
    for i, row in enumerate(cast("list[Any]", rows), 1):
        if isinstance(row, dict):
            yield f"{path}:[{i}]", cast("dict[str, Any]", row)
        else:
            kind = type(row).__name__
            on_bad(f"{path}:[{i}]", "not JSON", f"expected a JSON object, found {kind}")


def _table_rows(
    path: Path, on_bad: OnBadData, progress: Callable[[int], None] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    with _open_stream(path, progress) as stream:
        text = _decode(stream.read(), str(path), on_bad)
    if text is None:
        return
    if not text.strip() or "\0" in text:
        reason = "binary" if text.strip() else "empty file"
        on_bad(str(path), reason, "binary data, not a table" if text.strip() else "is empty")
        return
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            values = {name: value for name, value in row.items() if isinstance(name, str)}
            if None in row or None in row.values():
                wanted = len(reader.fieldnames or ())
                on_bad(
                    f"{path}:{reader.line_num}",
                    "not a table",
                    f"expected {wanted} columns, as the first line has",
                )
                continue
            yield f"{path}:{reader.line_num}", values
    except csv.Error as error:
        on_bad(f"{path}:{reader.line_num}", "not a table", str(error))
