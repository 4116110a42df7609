"""Torch's files without its zip format, written by torch itself: read, or refused where damaged."""

import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.torch_format import read_torch_file
from opt_core.checkpoints.torch_legacy import LEGACY_MAGIC, LegacyFile
from opt_core.errors import CheckpointError
from tests.support.files.checkpoint_fixtures import (
    EMBEDDING,
    TINY,
    assert_same,
    loaded,
    plan,
    random_weights,
)

torch: Any = pytest.importorskip("torch")


def save(path: Path, content: Any) -> bytes:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_model_is_read_in_place(path, dtype):
    weights = random_weights(dtype="float32" if dtype == "bfloat16" else dtype)
    state = {n: torch.from_numpy(a).to(getattr(torch, dtype)) for n, a in weights.items()}
    state["lm_head.weight"] = state[EMBEDDING]
    save(path, {"model": {f"module.{name}": tensor for name, tensor in state.items()}, "epoch": 3})
    result = plan(path.parent, TINY)
    found = loaded(result, "float32")
    assert result.config.tie_word_embeddings
    assert_same(found, {name: state[name].float().numpy() for name in weights})


def test_views_and_parameters(path):
    base = torch.arange(24.0).reshape(4, 6)
    views = {"base": base, "part": base[1:3, 2:], "transposed": base.T, "empty": base[:0]}
    views["parameter"] = torch.nn.Parameter(base.clone())
    save(path, views)
    for name, stored in read_torch_file(path).items():
        np.testing.assert_array_equal(stored.read(), views[name].detach().numpy())


def test_every_truncation_and_what_follows_is_an_error(path):
    content = save(path, {"w": torch.arange(6.0), "v": torch.ones(2)})
    for size in range(1, len(content)):
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=str(path)):
            read_torch_file(path)
    path.write_bytes(content + b"x")
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        read_torch_file(path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of strings that damage makes odd
def test_every_damaged_byte_is_an_error_or_still_a_sound_file(path):
    content = save(path, {"w": torch.arange(6.0)})
    rng, refusals = np.random.default_rng(0), 0
    for at in range(len(LEGACY_MAGIC), len(content)):
        path.write_bytes(content[:at] + bytes([int(rng.integers(256))]) + content[at + 1 :])
        try:
            for stored in read_torch_file(path).values():
                stored.read().sum()
        except CheckpointError:
            refusals += 1
    assert refusals > 100


class Runs:
    def __reduce__(self) -> Any:
        return os.system, ("touch RAN",)


def test_nothing_runs_and_lies_are_refused(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    content = save(path, {"w": torch.arange(6.0)})
    start = content.index(struct.pack("<q", 6))
    path.write_bytes(content[:start] + struct.pack("<q", 7) + content[start + 8 :])
    with pytest.raises(CheckpointError, match="not what it lists"):
        read_torch_file(path)
    at = content.index(b"little_endian")
    path.write_bytes(content[:at] + content[at:].replace(b"\x88", b"\x89", 1))
    with pytest.raises(CheckpointError, match="byte order that is not read"):
        read_torch_file(path)
    save(path, {"w": torch.arange(6.0), "evil": Runs()})
    with pytest.raises(CheckpointError, match=r"refused '(posix|nt)\.system'"):
        read_torch_file(path)
    body = b"".join(pickle.dumps(part, 2) for part in (1001, Runs()))
    path.write_bytes(LEGACY_MAGIC + body)
    with pytest.raises(CheckpointError, match=r"refused '(posix|nt)\.system'"):
        LegacyFile(TensorFile(path))
    assert not Path("RAN").exists()
