"""One NumPy file for each tensor, as FlexGen and alpa keep the weights of a model.

The files are named after metaseq's parameters ("decoder.layers.0.fc1.weight", "decoder.layer_norm.
bias"), with or without ".npy", and nothing else is in them: no configuration, no pickles.
"""

import io
import re
from pathlib import Path
from tokenize import TokenError

import numpy as np

from conversion.formats.metaseq import canonical_tensors
from opt_core.checkpoints.load import Checkpoint
from opt_core.checkpoints.tensors import FLOAT_DTYPES, LazyTensor, StoredTensor, TensorFile
from opt_core.errors import CheckpointError

_NAME = re.compile(r"(?P<name>(?:.+\.)?decoder\..+\.(?:weight|bias)|lm_head\.weight)(?:\.npy)?")
_TABLE = re.compile(r"(?:.+\.)?decoder\.embed_tokens\.weight(?:\.npy)?")
_LONGEST_HEADER = 1 << 14
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def is_numpy_folder(folder: Path) -> bool:
    """Whether a folder has a token table in a file of its own."""
    return folder.is_dir() and any(_TABLE.fullmatch(file.name) for file in folder.iterdir())


def open_numpy(folder: Path) -> Checkpoint:
    """Reads the headers of all arrays of a folder.

    Args:
        folder: Where `is_numpy_folder` says yes.

    Raises:
        CheckpointError: A file is damaged, or no array of floating-point numbers.
    """
    named = {file: _NAME.fullmatch(file.name) for file in sorted(folder.iterdir())}
    stored: dict[str, StoredTensor] = {}
    for file, match in named.items():
        if match:
            other = stored.setdefault(match["name"], tensor := _read(file, match["name"]))
            if other is not tensor:
                raise CheckpointError(f"{file}: its tensor is there twice, in {other.file} too")
    tensors: dict[str, LazyTensor] = {}
    for name, tensor in canonical_tensors(stored):
        if name in tensors:
            raise CheckpointError(f"{tensor.file}: {name!r} is there twice, under two names")
        tensors[name] = tensor
    return Checkpoint(folder, tuple(tensor.file for tensor in stored.values()), tensors, "numpy")


def _read(path: Path, name: str) -> StoredTensor:
    source = TensorFile(path)
    start = io.BytesIO(source.bytes_at(0, _LONGEST_HEADER))
    try:
        read_header = _HEADERS[np.lib.format.read_magic(start)]
        shape, is_fortran, dtype = read_header(start, max_header_size=_LONGEST_HEADER)
    except (KeyError, ValueError, TypeError, OverflowError, SyntaxError, TokenError):
        raise CheckpointError(f"{path}: no array as NumPy saves it; write it again") from None
    if dtype not in FLOAT_DTYPES.values():
        raise CheckpointError(
            f"{path}: an array of {dtype.str}; expected {', '.join(FLOAT_DTYPES)}, in this "
            "machine's byte order"
        )
    if not is_fortran:
        return StoredTensor(name, shape, dtype, source, start.tell())
    return StoredTensor(name, shape[::-1], dtype, source, start.tell()).transposed()
