"""Documents and rows from files: every format gives the same, and what is wrong is named."""

import bz2
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from opt_core.data import readers
from opt_core.data.readers import find_files, read_documents, read_json_data, read_rows, read_text
from opt_core.errors import DataError

TEXTS = ["One, two.\nThree", 'Vier "fünf"\t日本語 🎉', "x"]
ROWS = "".join(json.dumps({"n": str(i), "text": t}) + "\n" for i, t in enumerate(TEXTS)).encode()


def table(delimiter: str) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([("n", "text"), *enumerate(TEXTS)])
    return file.getvalue().encode()


def parquet() -> bytes:
    file = io.BytesIO()
    rows = pyarrow.table({"n": ["0", "1", "2"], "text": TEXTS})
    pyarrow.parquet.write_table(rows, file, row_group_size=2)
    return file.getvalue()


FILES: dict[str, bytes] = {
    "a.jsonl": ROWS,
    "a.ndjson": b"\xef\xbb\xbf" + ROWS.replace(b"\n", b"\r\n\r\n"),
    "a.json": json.dumps([{"n": str(i), "text": t} for i, t in enumerate(TEXTS)]).encode(),
    "lines.json": ROWS,
    "a.jsonl.gz": gzip.compress(ROWS[:40]) + gzip.compress(ROWS[40:]),
    "A.JSONL.ZST": zstandard.compress(ROWS[:40]) + zstandard.compress(ROWS[40:]),
    "a.csv": table(","),
    "a.tsv": table("\t"),
    "a.parquet": parquet(),
}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_every_format_holds_the_same_documents(tmp_path: Path, name: str):
    path = write(tmp_path, {name: FILES[name]}) / name
    told: list[int] = []
    found = list(read_documents(path, progress=told.append))
    assert [document.text for document in found] == TEXTS
    assert all(document.place.startswith(f"{path}:") for document in found)
    assert [row["n"] for _, row in read_rows(path)] == ["0", "1", "2"]
    assert all(0 <= count <= len(FILES[name]) for count in told)


def test_places_are_lines(tmp_path: Path):
    path = write(tmp_path, {"a.jsonl": ROWS}) / "a.jsonl"
    assert [place for place, _ in read_rows(path)] == [f"{path}:{i}" for i in (1, 2, 3)]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_text_is_one_document_or_cut_at_a_separator(
    tmp_path: Path, compress: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
):
    text = "\ufeffeins\r\nzwei\r\n\r\ndrei äöü\n\n\n\nvier"
    suffix = {bytes: "", gzip.compress: ".gz"}.get(compress, ".zst")
    path = write(tmp_path, {f"a.txt{suffix}": compress(text.encode())}) / f"a.txt{suffix}"
    whole = "eins\nzwei\n\ndrei äöü\n\n\n\nvier"
    assert [d.text for d in read_documents(path)] == [whole]
    assert read_text(path) == whole
    for piece in (1, 2, 3, 1 << 20):  # wherever a character or a separator is cut
        monkeypatch.setattr(readers, "_PIECE", piece)
        assert [d.text for d in read_documents(path, separator="\n\n")] == whole.split("\n\n")


def test_folders_are_searched_in_order(tmp_path: Path):
    write(tmp_path, {"b/2.txt": b"x", "b/1.jsonl.gz": b"", "a.md": b"x", "c.bin": b"", "d.gz": b""})
    assert find_files([tmp_path]) == [tmp_path / n for n in ("a.md", "b/1.jsonl.gz", "b/2.txt")]
    assert find_files([tmp_path / "b" / "2.txt", tmp_path / "a.md"])[0].name == "2.txt"


BAD: dict[str, tuple[bytes, str, str]] = {
    "empty.txt": (b"", "empty file", "is empty"),
    "empty.jsonl": (b"", "empty file", "is empty"),
    "empty.csv": (b"", "empty file", "is empty"),
    "binary.txt": (b"abc\0def", "binary", "binary data, not text"),
    "image.txt": (b"\x89PNG\0\r\n", "not UTF-8", r"binary data, not text \(byte 4 is zero\)"),
    "latin.txt": (b"na" + "ï".encode("latin1") + b"ve", "not UTF-8", r"byte 2 \(0xef\) is not"),
    "mixed.txt": ("ï".encode() + b" \xef ", "not UTF-8", r"byte 3 \(0xef\) is not UTF-8"),
    "cut.txt": ("aï".encode()[:2], "not UTF-8", r"byte 1 \(0xc3\) is not UTF-8"),
    "wide.txt": ("ab".encode("utf-16"), "not UTF-8", "is UTF-16; convert it to UTF-8"),
    "mixed.jsonl": (ROWS + b'{"text": "\xef"}', "not UTF-8", r"mixed.jsonl:4: byte 10 \(0xef\)"),
    "cut.jsonl": (ROWS[:-9], "not JSON", "cut.jsonl:3: not valid JSON"),
    "deep.jsonl": (b"[1]\n", "not JSON", r"deep.jsonl:\[1\]: expected a JSON object, found int"),
    "list.jsonl": (ROWS + b"[1]", "not JSON", "list.jsonl:4: expected a JSON object, found list"),
    "binary.jsonl": (b"\0\0", "binary", "binary.jsonl:1: binary data, not JSON"),
    "other.jsonl": (b'{"body": "x"}', "no text", "expected a field 'text', found 'body'"),
    "number.jsonl": (b'{"text": 5}', "no text", "'text': expected a string, found int"),
    "short.csv": (b"n,text\n1\n", "not a table", "short.csv:2: expected 2 columns"),
    "binary.csv": (b"a,b\0\n", "binary", "binary data, not a table"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_refused_or_counted(tmp_path: Path, name: str):
    data, reason, message = BAD[name]
    path = write(tmp_path, {name: data}) / name
    with pytest.raises(DataError, match=message) as error:
        list(read_documents(path))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    found: list[str] = []
    good = list(read_documents(path, on_bad=lambda place, why, what: found.append(why)))
    assert found == [reason]
    assert len(good) == {"mixed.jsonl": 3, "cut.jsonl": 2, "list.jsonl": 3}.get(name, 0)


DAMAGED: dict[str, tuple[bytes, str]] = {
    "a.jsonl.gz": (gzip.compress(ROWS)[:-9], "damaged gz data"),
    "b.jsonl.gz": (ROWS, "damaged gz data"),
    "a.txt.zst": (bz2.compress(ROWS), "damaged zst data"),
    "a.parquet": (parquet()[:-20], "damaged, or no Parquet file"),
    "b.parquet": (b"", "damaged, or no Parquet file"),
    "c.parquet": (
        parquet().replace(b"text", b"body"),
        "expected a column 'text', found 'n', 'body'",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_errors(tmp_path: Path, name: str):
    data, message = DAMAGED[name]
    path = write(tmp_path, {name: data}) / name
    with pytest.raises(DataError, match=message) as error:
        list(read_documents(path))
    assert "\n" not in str(error.value)


def test_paths_that_lead_nowhere_are_errors(tmp_path: Path):
    write(tmp_path, {"a.doc": b"", "empty/a.bin": b"", "a.txt": b"x"})
    for path, message in (
        ("nowhere.txt", "no such file or folder"),
        ("a.doc", "expected a name that ends in .txt"),
        ("empty", "holds no file of a known kind"),
    ):
        with pytest.raises(DataError, match=message):
            find_files([tmp_path / path])
    with pytest.raises(DataError, match="expected rows"):
        list(read_rows(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"{", "not valid JSON"),
        (b"\xff{", "not UTF-8"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_whole_json_file_is_read_or_refused(tmp_path: Path, data: bytes, message: str):
    path = write(tmp_path, {"a.json": data, "good.json": b'\xef\xbb\xbf{"a": 1}'}) / "a.json"
    assert read_json_data(tmp_path / "good.json") == {"a": 1}
    with pytest.raises(DataError, match=message):
        read_json_data(path)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, {"a.parquet": parquet(), "a.txt.zst": zstandard.compress(b"x")})
    for module, name in (("pyarrow.parquet", "a.parquet"), ("zstandard", "a.txt.zst")):
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, module, None)
            with pytest.raises(DataError, match=r'pip install "opt-lm\[data\]"'):
                list(read_documents(tmp_path / name))
