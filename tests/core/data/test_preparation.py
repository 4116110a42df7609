"""Preparing a corpus, from files to token blocks; what is dropped is counted, nothing half-made."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core import OPTTokenizer
from opt_core.data.cleaning import Cleaning
from opt_core.data.preparation import DataConfig, prepare
from opt_core.data.token_blocks import TokenBlocks
from opt_core.errors import DataError
from tests.support.small_tokenizer import OPT_CONFIG, write_opt_folder

TEXTS = [f"Text number {i}: {' '.join(str(i * k) for k in range(20))}." for i in range(1, 61)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


def write_lines(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def stream(folder: Path) -> list[int]:
    return np.concatenate(list(TokenBlocks.open(folder))).tolist()  # type: ignore[arg-type]


def documents(ids: list[int]) -> list[list[int]]:
    """The documents between the ends of text; the last one may be cut."""
    rows: list[list[int]] = [[]]
    for token in ids:
        if token == 2:
            rows.append([])
        else:
            rows[-1].append(token)
    return rows


def test_documents_come_back_between_end_tokens(tmp_path: Path, tokenizer: OPTTokenizer):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    report = prepare([source], tmp_path / "out", tokenizer, DataConfig(16, 0.25))
    sides = {name: stream(tmp_path / "out" / name) for name in ("train", "validation")}
    found = {name: documents(ids) for name, ids in sides.items()}
    for name, ids in sides.items():
        split = report.splits[name]
        assert ids[0] == 2
        assert len(ids) == split.blocks * 16 == split.tokens - split.left_out
        texts = [tokenizer.decode(row) for row in found[name][1:]]
        kept = [text for text in TEXTS if text in texts]
        assert texts[:-2] == kept[: len(texts) - 2]  # in order; the end may be cut
        assert abs(len(kept) - split.documents) <= 2
    assert sum(split.documents for split in report.splits.values()) == 60
    assert 5 < report.splits["validation"].documents < 25
    assert report.documents == 60
    assert report.bytes == sum(map(len, TEXTS))
    assert report.dropped == {}
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report.to_dict()
    expected = sum(len(tokenizer.encode(text)) for text in TEXTS) + 2
    assert sum(split.tokens for split in report.splits.values()) == expected


def test_a_tokenizer_without_a_bos_token_adds_none(tmp_path: Path):
    folder = write_opt_folder(tmp_path / "t", {**OPT_CONFIG, "add_bos_token": False})
    tokenizer = OPTTokenizer.from_pretrained(folder)
    source = write_lines(tmp_path / "a.jsonl", ["dog dog", "world"])
    prepare([source], tmp_path / "out", tokenizer, DataConfig(2, 0))
    ids = stream(tmp_path / "out" / "train")
    first = [*tokenizer.encode("dog dog"), 2]
    assert ids[: len(first)] == first


def test_a_document_stays_on_its_side(tmp_path: Path, tokenizer: OPTTokenizer):
    sides: list[set[str]] = []
    for i, texts in enumerate([TEXTS, ["other " + t for t in TEXTS[:7]] + TEXTS[::-1][:40]]):
        source = write_lines(tmp_path / f"{i}.jsonl", texts)
        prepare([source], tmp_path / f"out{i}", tokenizer, DataConfig(2, 0.25))
        rows = documents(stream(tmp_path / f"out{i}" / "validation"))
        sides.append({tokenizer.decode(row) for row in rows} & set(TEXTS[20:]))
    assert len(sides[0]) > 5
    assert len(sides[0] ^ sides[1]) <= 2  # the last one of each may have been cut


def test_any_number_of_processes_gives_the_same(
    tmp_path: Path, tokenizer: OPTTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("opt_core.data.preparation._CHUNK", 400)
    source = write_lines(tmp_path / "a.jsonl", [*TEXTS, TEXTS[3], "x\0"])
    seen: list[tuple[int, int]] = []
    reports = [
        prepare(
            [source], tmp_path / str(n), tokenizer, DataConfig(16, 0.25), n,
            lambda *done: seen.append(done),
        )
        for n in (1, 2)
    ]  # fmt: skip
    assert reports[0] == reports[1]
    for name in ("train/tokens.bin", "validation/tokens.bin", "report.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    size = source.stat().st_size
    assert seen[-1] == (size, size)
    assert all(0 <= done <= total == size for done, total in seen)


def test_what_is_dropped_is_counted_with_its_reason(tmp_path: Path, tokenizer: OPTTokenizer):
    near = TEXTS[0].replace("number", "NUMBER")
    texts = [*TEXTS, TEXTS[0], near, " ", "hi", "x" * 999, "spam ham egg " * 40]
    source = write_lines(tmp_path / "a.jsonl", texts)
    with source.open("ab") as file:
        file.write(b'{"text": "\xff"}\n{"body": 1}\n{\n')
    config = DataConfig(16, 0, skip_bad=True, cleaning=Cleaning(min_chars=3, max_chars=900))
    report = prepare([source], tmp_path / "out", tokenizer, config)
    assert report.dropped == {
        "not UTF-8": 1, "no text": 1, "not JSON": 1, "duplicate": 1, "near-duplicate": 1,
        "empty": 1, "too short": 1, "too long": 1, "repetitive": 1,
    }  # fmt: skip
    assert report.documents == 69
    assert report.splits["train"].documents == 60
    assert report.examples["duplicate"] == [f"{source}:61"]
    assert report.examples["not UTF-8"][0].startswith(f"{source}:67: byte 10")
    everything = Cleaning(duplicates=False, max_repetition=1)
    config = DataConfig(16, 0, skip_bad=True, cleaning=everything)
    report = prepare([source], tmp_path / "all", tokenizer, config)
    assert report.splits["train"].documents == 65


def test_text_files_are_cut_where_asked(tmp_path: Path, tokenizer: OPTTokenizer):
    (tmp_path / "a.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "b.md").write_text("A last one.")
    report = prepare(
        [tmp_path], tmp_path / "out", tokenizer, DataConfig(16, 0.25, separator="\n\n")
    )
    assert (report.files, report.documents) == (2, 61)


@pytest.mark.parametrize(
    ("files", "change", "message"),
    [
        ({"a.txt": ""}, {}, "a.txt: is empty"),
        (
            {"a.txt": "", "b.txt": " "},
            {"skip_bad": True},
            "no document is left of 2 read: 1 empty file, 1 empty",
        ),
        ({"a.txt": "dog"}, {"validation_fraction": 0.5}, "validation: none of 1 documents fell"),
        ({"a.txt": "dog"}, {"validation_fraction": 0}, "train: 4 tokens fill no block of 16"),
        ({"a.txt": "a\0b"}, {}, "binary data"),
        ({"a.jsonl": "{}"}, {}, "expected a field 'text', found nothing"),
        ({"a.txt": "x"}, {"separator": ""}, "separator: expected some characters"),
        ({"a.txt": "x"}, {"validation_fraction": 1}, "expected 0 <= x < 1, received 1"),
        ({"a.txt": "x"}, {"sequence_length": 1}, "sequence_length: expected at least 2"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    tmp_path: Path, tokenizer: OPTTokenizer, files: dict[str, str], change: Any, message: str
):
    (tmp_path / "in").mkdir()
    for name, text in files.items():
        (tmp_path / "in" / name).write_text(text)

    def run() -> None:
        config = DataConfig(**{"sequence_length": 16, **change})
        prepare([tmp_path / "in"], tmp_path / "out", tokenizer, config)

    with pytest.raises(DataError, match=message) as error:
        run()
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_validation_side_less_than_a_block_is_refused(tmp_path: Path, tokenizer: OPTTokenizer):
    source = write_lines(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(DataError, match=r"validation: \d+ tokens fill no block of 2500; .* or ano"):
        prepare([source], tmp_path / "out", tokenizer, DataConfig(2500, 0.1))
    assert not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="processes: expected at least 1, received 0"):
        prepare([source], tmp_path / "out", tokenizer, processes=0)
