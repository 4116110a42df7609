"""Broken and hostile files: always one OPTError that names the file, never anything else.

Nothing runs, hangs, takes memory, or is written outside the destination.
"""

import re
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import conversion
from conversion.readers import open_any_checkpoint
from opt_core.errors import OPTError
from tests.support.files.format_fixtures import make
from tests.support.hostile.corpus import CORPUS, FILES, MEMORY, SECONDS, used


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint of every format."""
    root = tmp_path_factory.mktemp("sound")
    make(root / "source")
    for kind in FILES:
        conversion.convert(root / "source", root / kind, kind)
    return root


def everything(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        yield str(path), path.lstat().st_size


def test_the_corpus_is_large():
    assert len(CORPUS) >= 200


def is_described(name: str) -> bool:
    """Whether `describe` has to see it too: not what lies behind the header, and of HDF5's files,
    which each take a process, every fourth."""
    is_hdf5 = name.lower().startswith(("h5", "kerashub"))
    return " cut to " not in name and not (is_hdf5 and list(CORPUS).index(name) % 4)


@pytest.mark.parametrize("name", CORPUS)
def test_what_is_broken_is_refused_in_one_line(
    name: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start, damage = CORPUS[name]
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (sound / start).iterdir() if start else ():
        (folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.chdir(tmp_path)
    damage(folder)
    before = list(everything(tmp_path))
    began, memory = used(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OPTError) as caught:
        conversion.convert(folder, tmp_path / "new")
    if is_described(name):
        try:
            told = conversion.describe(folder).problems
        except OPTError as error:
            told = (str(error),)
        assert any(str(folder) in problem for problem in told)
    message = str(caught.value)
    assert str(folder) in message, message
    assert message.isprintable(), message
    assert len(message) < 2000
    assert used() - began < 2 * SECONDS  # for the two calls
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY / 1024
    assert list(everything(tmp_path)) == before  # nothing new, nothing run


# What the formats start their records with: zip archives, HDF5, MessagePack's extensions.
MARKS = (b"PK\1\2", b"PK\3\4", b"PK\5\6", b"TREE", b"SNOD", b"HEAP", b"GCOL", b"\xc7", b"\xc8")
MOST = {"tf-h5": 9, "keras-hub": 4}
"""Of HDF5 files, as each takes a process."""


def boundaries(path: Path) -> list[int]:
    """Where a part of a file starts or ends: records, header, tensors."""
    data, found = path.read_bytes(), {8}
    for mark in MARKS:
        at = data.find(mark)
        while at >= 0:
            found |= {at, at + len(mark)}
            at = data.find(mark, at + 1)
    for tensor in open_any_checkpoint(path).checkpoint.tensors.values():
        found |= {tensor.offset, tensor.offset + tensor.nbytes}
    return sorted(found - {0, len(data)})


@pytest.mark.parametrize("kind", FILES)
def test_what_ends_at_any_boundary_is_refused(kind: str, sound: Path, tmp_path: Path):
    folder = tmp_path / "model"
    shutil.copytree(sound / kind, folder)
    path = folder / FILES[kind]
    data, places = path.read_bytes(), boundaries(path)
    assert len(places) > 30
    for size in places[:: -(-len(places) // MOST.get(kind, len(places)))]:
        path.unlink()
        path.write_bytes(data[:size])
        with pytest.raises(OPTError, match=re.escape(str(path))):
            conversion.convert(folder, tmp_path / "new")
        assert not (tmp_path / "new").exists()
