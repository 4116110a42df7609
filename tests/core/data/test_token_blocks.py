"""Token blocks on disk: what comes back, and folders that are refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.data.token_blocks import BLOCKS_FILE, TOKENS_FILE, TokenBlocks, write_blocks
from opt_core.errors import DataError, OPTError


@pytest.mark.parametrize(("vocab_size", "width"), [(1 << 16, 2), ((1 << 16) + 1, 4)])
def test_what_was_written_comes_back(tmp_path: Path, vocab_size: int, width: int):
    ids = np.random.default_rng(0).integers(0, vocab_size, 1003)
    ids[7] = vocab_size - 1
    left = write_blocks(tmp_path / "a", [ids[:5], [], ids[5:700], ids[700:]], 50, vocab_size)
    assert left == 3
    assert (tmp_path / "a" / TOKENS_FILE).stat().st_size == 1000 * width
    blocks = TokenBlocks.open(tmp_path / "a")
    assert (len(blocks), blocks.sequence_length, blocks.vocab_size) == (20, 50, vocab_size)
    assert blocks[3].dtype == np.int32
    assert np.array_equal(np.concatenate([blocks[i] for i in range(20)]), ids[:1000])
    assert np.array_equal(np.stack(list(blocks)), ids[:1000].reshape(20, 50))  # type: ignore[call-overload]
    with pytest.raises(IndexError):
        blocks[20]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"]


def interrupted() -> Iterator[list[int]]:
    yield [1] * 100
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        (lambda: [[1] * 9], "9 tokens fill no block of 10"),
        (list, "0 tokens fill no block"),
        (lambda: [[1] * 10, [99]], r"expected ids in 0\.\.98, received 99\.\.99"),
        (lambda: [[-1] * 10], r"expected ids in 0\.\.98, received -1"),
        (lambda: [np.ones(10)], "expected rows of integers, received float64"),
        (lambda: [np.ones((2, 5), int)], "expected rows of integers"),
        (interrupted, "^$"),
    ],
)
def test_nothing_is_half_written(tmp_path: Path, chunks: Callable[[], Any], message: str):
    with pytest.raises((DataError, KeyboardInterrupt), match=message):
        write_blocks(tmp_path / "a", chunks(), 10, 99)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(DataError, match="already exists"):
        write_blocks(tmp_path, [[1] * 10], 10, 99)
    with pytest.raises(DataError, match="sequence_length: expected at least 2"):
        write_blocks(tmp_path / "a", [[1] * 10], 1, 99)
    (tmp_path / ".a.partial").mkdir()  # what a killed process left
    (tmp_path / ".a.partial" / "old").write_text("x")
    write_blocks(tmp_path / "a", [[1] * 10], 10, 99)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "mine"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [BLOCKS_FILE, TOKENS_FILE]


def test_a_disk_that_refuses_is_an_error(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="cannot be written"):
        write_blocks(tmp_path / "file" / "a", [[1] * 10], 10, 99)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "not token blocks of a format this version reads"),
        ({"dtype": "float32"}, "not token blocks of a format"),
        ({"blocks": 3}, r"tokens.bin: expected 60 bytes, as blocks.json says, found 40"),
        ({"blocks": True}, "blocks: expected a number > 0, found True"),
        ({"sequence_length": 0}, "sequence_length: expected a number > 0, found 0"),
    ],
)
def test_a_bad_folder_is_refused(tmp_path: Path, change: dict[str, object], message: str):
    write_blocks(tmp_path / "a", [range(20)], 10, 99)
    path = tmp_path / "a" / BLOCKS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(OPTError, match=message):
        TokenBlocks.open(tmp_path / "a")


def test_a_folder_without_its_files_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no folder of token blocks"):
        TokenBlocks.open(tmp_path / "nowhere")
    write_blocks(tmp_path / "train", [range(20)], 10, 99)
    with pytest.raises(DataError, match="name one of the folders in it: train"):
        TokenBlocks.open(tmp_path)
    (tmp_path / "train" / TOKENS_FILE).unlink()
    with pytest.raises(DataError, match=r"tokens.bin: No such file"):
        TokenBlocks.open(tmp_path / "train")
    (tmp_path / "train" / BLOCKS_FILE).write_text("{")
    with pytest.raises(DataError, match=r"blocks.json: not valid JSON"):
        TokenBlocks.open(tmp_path / "train")
