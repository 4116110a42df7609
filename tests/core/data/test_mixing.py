"""Sources mixed by weights: what each gave is counted; folders of `datasets`."""

from pathlib import Path

import pytest

from opt_core import OPTTokenizer
from opt_core.data.mixing import SourceReport, in_turn
from opt_core.data.preparation import DataConfig, prepare
from opt_core.data.readers import Document, find_files, read_documents
from opt_core.errors import DataError
from tests.support.small_tokenizer import write_opt_folder

TEXTS = [f"Text number {i}: {' '.join(str(i * k) for k in range(20))}." for i in range(1, 91)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> OPTTokenizer:
    return OPTTokenizer.from_pretrained(write_opt_folder(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A file of 60 documents, and one of 30."""
    home = tmp_path_factory.mktemp("sources")
    for name, texts in (("large.txt", TEXTS[:60]), ("small.txt", TEXTS[60:])):
        (home / name).write_text("\n\n".join(texts))
    return [home / "large.txt", home / "small.txt"]


def config_of(*weights: float) -> DataConfig:
    return DataConfig(16, 0.0, separator="\n\n", weights=weights or None)


def test_the_source_that_is_behind_gives_the_next():
    reports = [SourceReport(), SourceReport()]
    streams = [iter([Document(letter * 10, "")] * count) for letter, count in (("a", 9), ("b", 2))]
    found = "".join(document.text[0] for _, document in in_turn(streams, (3, 1), reports))
    assert found == "abaaabaaa"  # with the end of b the proportion could not be kept
    assert [report.is_exhausted for report in reports] == [False, True]


def test_tokens_are_shared_as_the_weights_say(tmp_path: Path, tokenizer, sources):
    report = prepare(sources, tmp_path / "out", tokenizer, config_of(1, 2))
    large, small = (report.sources[str(path)] for path in sources)
    assert abs(small.share - 2 / 3) < 0.03
    assert abs(large.share + small.share - 1) < 1e-4
    assert (small.documents, small.is_exhausted, large.is_exhausted) == (30, True, False)
    assert 10 < large.documents < 20
    assert large.tokens + small.tokens == report.splits["train"].tokens - 1
    assert large.bytes + small.bytes == report.bytes
    # The number of processes changes nothing.
    again = prepare(sources, tmp_path / "two", tokenizer, config_of(1, 2), processes=2)
    assert again == report
    for name in ("train/tokens.bin", "report.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()


def test_without_weights_all_is_read_and_a_lost_source_is_seen(tmp_path, tokenizer, sources):
    copy = tmp_path / "copy.txt"
    copy.write_text(sources[1].read_text())
    report = prepare([*sources, copy], tmp_path / "out", tokenizer, config_of())
    found = [report.sources[str(path)] for path in (*sources, copy)]
    assert [source.documents for source in found] == [60, 30, 30]
    assert [source.kept for source in found] == [60, 30, 0]
    assert (found[2].tokens, found[2].share) == (0, 0.0)
    assert all(source.is_exhausted for source in found)


def test_weights_that_do_not_fit(tmp_path: Path, tokenizer, sources):
    with pytest.raises(DataError, match=r"weights: expected one for each of 2 different sources"):
        prepare(sources, tmp_path / "out", tokenizer, config_of(1, 2, 3))
    with pytest.raises(DataError, match=r"weights: expected numbers above 0, received \(1, 0\)"):
        config_of(1, 0)
    assert not (tmp_path / "out").exists()


def write_arrow(folder: Path, name: str, texts: list[str]) -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"text": texts, "number": range(len(texts))})
    with (
        arrow.OSFile(str(folder / name), "wb") as file,
        arrow.ipc.new_stream(file, table.schema) as out,
    ):
        out.write_table(table, max_chunksize=7)


def test_folders_of_datasets_are_read(tmp_path: Path):
    """As `DatasetDict.save_to_disk` writes them, with a cache that belongs to nothing."""
    datasets = pytest.importorskip("datasets")
    half = {"train": TEXTS[:40], "test": TEXTS[40:]}
    made = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in half.items()}
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved", num_shards={"train": 2, "test": 1})
    write_arrow(tmp_path / "saved" / "train", "cache-1.arrow", ["not of it"])
    files = find_files([tmp_path / "saved"])
    assert [path.suffix for path in files] == [".arrow"] * 3
    found = [document.text for path in files for document in read_documents(path)]
    assert found == TEXTS[40:] + TEXTS[:40]


def test_arrow_files_alone_and_damaged(tmp_path: Path):
    write_arrow(tmp_path, "a.arrow", TEXTS)
    found = [*read_documents(tmp_path / "a.arrow")]
    assert [document.text for document in found] == TEXTS
    assert found[8].place == f"{tmp_path / 'a.arrow'}:9"
    with pytest.raises(DataError, match=r"a\.arrow: expected a column 'body', found 'text', 'num"):
        next(read_documents(tmp_path / "a.arrow", "body"))
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"a\.arrow: damaged, or no stream of Arrow's: "):
        list(read_documents(tmp_path / "a.arrow"))
