"""Token blocks on disk: a text corpus as rows of equal length, memory-mapped.

A folder holds `tokens.bin`, the ids of all blocks one after another (little-endian, two bytes each
where the vocabulary allows it), and `blocks.json`, which says how to read them.
"""

import shutil
from collections.abc import Iterable, Sequence
from contextlib import closing
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.atomic import new_folder
from opt_core.errors import DataError
from opt_core.json_files import parse_json_object, write_json

TOKENS_FILE = "tokens.bin"
BLOCKS_FILE = "blocks.json"
_FORMAT = 1
_DTYPES = {"uint16": "<u2", "int32": "<i4"}


class TokenBlocks:
    """A sequence of blocks of token ids; made by `open`, written by `write_blocks`.

    Args:
        tokens_NT: All blocks, usually mapped from a file.
        vocab_size: Ids are below it.

    Attributes:
        sequence_length: Tokens per block T.
        vocab_size: Ids are below it: that of the tokenizer that made them.
    """

    def __init__(self, tokens_NT: NDArray[Any], vocab_size: int) -> None:
        self._tokens = tokens_NT
        self.sequence_length: int = tokens_NT.shape[1]
        self.vocab_size = vocab_size

    @classmethod
    def open(cls, folder: str | PathLike[str]) -> "TokenBlocks":
        """Maps a prepared folder; no token is read yet.

        Args:
            folder: A folder that `write_blocks` made.

        Raises:
            DataError: It is no such folder, or its files do not fit one another.
        """
        path = Path(folder)
        about = _read_about(path)
        dtype = np.dtype(_DTYPES[about["dtype"]])
        shape = (about["blocks"], about["sequence_length"])
        expected = shape[0] * shape[1] * dtype.itemsize
        try:
            size = (path / TOKENS_FILE).stat().st_size
            if size != expected:
                raise DataError(
                    f"{path / TOKENS_FILE}: expected {expected} bytes, as {BLOCKS_FILE} says, "
                    f"found {size}"
                )
            return cls(np.memmap(path / TOKENS_FILE, dtype, "r", shape=shape), about["vocab_size"])
        except OSError as error:
            raise DataError(f"{path / TOKENS_FILE}: {error.strerror or error}") from None

    def __len__(self) -> int:
        """Number of blocks."""
        return len(self._tokens)

    def __getitem__(self, index: int) -> NDArray[np.int32]:
        """The ids of one block, int32 [T], a copy."""
        return self._tokens[index].astype(np.int32)


class BlockWriter:
    """Writes a stream of ids as blocks into a folder that the caller has made and will keep or not.

    Args:
        folder: Where the two files go.
        sequence_length: Tokens per block.
        vocab_size: Number of token ids; decides how wide an id is stored.

    Attributes:
        tokens: Ids written so far.

    Raises:
        DataError: A block of less than two tokens.
    """

    def __init__(self, folder: Path, sequence_length: int, vocab_size: int) -> None:
        if sequence_length < 2:
            raise DataError(f"sequence_length: expected at least 2, received {sequence_length}")
        self.tokens = 0
        self.sequence_length = sequence_length
        self._folder, self._vocab_size = folder, vocab_size
        self._name = "uint16" if vocab_size <= 1 << 16 else "int32"
        self._file = (folder / TOKENS_FILE).open("wb")  # closed by `close`

    def write(self, ids: NDArray[Any] | Sequence[int]) -> None:
        """Appends some ids.

        Raises:
            DataError: They are no row of ids of this vocabulary.
        """
        array = np.asarray(ids)
        _check_ids(array, self._vocab_size)
        self._file.write(array.astype(_DTYPES[self._name]).tobytes())
        self.tokens += len(array)

    def finish(self) -> tuple[int, int]:
        """Cuts off what fills no block and writes the description.

        Returns:
            The number of blocks, and of tokens cut off.

        Raises:
            DataError: There is no whole block.
        """
        blocks, left = divmod(self.tokens, self.sequence_length)
        if not blocks:
            raise DataError(
                f"{self.tokens} tokens fill no block of {self.sequence_length}; "
                "give more text or a smaller sequence_length"
            )
        self._file.truncate((self.tokens - left) * np.dtype(_DTYPES[self._name]).itemsize)
        self.close()
        about = {
            "format": _FORMAT,
            "blocks": blocks,
            "sequence_length": self.sequence_length,
            "vocab_size": self._vocab_size,
            "dtype": self._name,
        }
        write_json(self._folder / BLOCKS_FILE, about)
        return blocks, left

    def take_back(self) -> NDArray[Any]:
        """Gives back the ids written so far, and removes the folder."""
        self.close()
        ids = np.fromfile(self._folder / TOKENS_FILE, _DTYPES[self._name])
        shutil.rmtree(self._folder)
        return ids

    def close(self) -> None:
        """Lets the file go; what was written is of no use without `finish`."""
        self._file.close()


def write_blocks(
    folder: str | PathLike[str],
    chunks: Iterable[NDArray[Any] | Sequence[int]],
    sequence_length: int,
    vocab_size: int,
) -> int:
    """Writes a stream of ids as blocks; the folder appears whole or not at all.

    Args:
        folder: A new folder.
        chunks: Ids, cut anywhere; taken one after another. The last ones that fill no block are
            left out.
        sequence_length: Tokens per block.
        vocab_size: Number of token ids; decides how wide an id is stored.

    Returns:
        Number of tokens left out at the end, less than one block.

    Raises:
        DataError: Less than one block in all, an id outside the vocabulary, a folder that exists,
            or a disk that refuses.
    """
    with new_folder(Path(folder), DataError) as stage:
        writer = BlockWriter(stage, sequence_length, vocab_size)
        with closing(writer):
            for chunk in chunks:
                writer.write(chunk)
            _, left = writer.finish()
    return left


def _check_ids(ids: NDArray[Any], vocab_size: int) -> None:
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise DataError(f"tokens: expected rows of integers, received {ids.dtype} {ids.shape}")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        raise DataError(
            f"tokens: expected ids in 0..{vocab_size - 1}, received {ids.min()}..{ids.max()}"
        )


def _read_about(folder: Path) -> dict[str, Any]:
    path = folder / BLOCKS_FILE
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        held = ", ".join(sorted(p.parent.name for p in folder.glob(f"*/{BLOCKS_FILE}")))
        hint = f"; name one of the folders in it: {held}" if held else ""
        raise DataError(f"{folder}: no folder of token blocks (no {BLOCKS_FILE}){hint}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    numbers = ("blocks", "sequence_length", "vocab_size")
    values = parse_json_object(text, path, DataError)
    if values.get("format") != _FORMAT or values.get("dtype") not in _DTYPES:
        raise DataError(f"{path}: not token blocks of a format this version reads")
    for name in numbers:
        if type(values.get(name)) is not int or values[name] < 1:
            raise DataError(f"{path}: {name}: expected a number > 0, found {values.get(name)!r}")
    return values
