"""Torch files without torch: what `torch.save` writes is read, everything else is refused."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.checkpoints.torch_format import read_torch_file
from opt_core.errors import CheckpointError
from tests.support.files.checkpoint_fixtures import (
    ORDERED_DICT,
    PARAMETER,
    STORAGE_NAMES,
    Cut,
    call,
    number,
    pickled,
    state_dict,
    storage,
    tensor,
    text,
    type_of,
    write_torch_file,
    write_torch_zip,
)

BASE = np.arange(24, dtype=np.float32).reshape(4, 6)
PLAIN = tensor(storage("0", "float32", 24), Cut("0", 0, (4, 6), (6, 1)))


def write(path: Path, pickle_: bytes, **layout: Any) -> None:
    write_torch_zip(path, pickle_, {"0": BASE.tobytes()}, **layout)


def refused(path: Path, message: str | None = None) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_torch_file(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.bin"


@pytest.mark.parametrize("aligned", [True, False])
def test_every_data_type_is_read_in_place(path, aligned):
    rng = np.random.default_rng(0)
    arrays = {name: rng.integers(0, 2, (3, 5)).astype(type_of[name]) for name in STORAGE_NAMES}
    write_torch_file(path, arrays, aligned=aligned)
    stored = read_torch_file(path)
    for name, array in arrays.items():
        result = stored[name].read()
        assert result.dtype == array.dtype
        assert result.flags.aligned
        np.testing.assert_array_equal(result, array)
        if aligned:
            assert np.shares_memory(result, stored[name].read())


def test_views_of_one_storage(path):
    write_torch_file(
        path,
        {
            "base": BASE,
            "tied": Cut("base", 0, (4, 6), (6, 1)),
            "transposed": Cut("base", 0, (6, 4), (1, 6)),
            "offset": Cut("base", 8, (3,), (1,)),
            "strided": Cut("base", 1, (2, 3), (12, 2)),
            "scalar": Cut("base", 5, (), ()),
            "empty": Cut("base", 24, (0, 6), (6, 1)),
            "expanded": Cut("base", 2, (3, 2), (0, 1)),
            "one": Cut("base", 3, (1, 2), (999, 1)),
        },
    )
    stored = read_torch_file(path)
    flat = BASE.ravel()
    for name, expected in {
        "tied": BASE,
        "transposed": BASE.T,
        "offset": flat[8:11],
        "strided": BASE[::2, 1:6:2],
        "scalar": flat[5],
        "empty": BASE[:0],
        "expanded": np.broadcast_to(flat[2:4], (3, 2)),
        "one": flat[None, 3:5],
    }.items():
        np.testing.assert_array_equal(stored[name].read(), expected)
    assert stored["tied"].is_same_as(stored["base"])
    for name in ("transposed", "offset", "expanded"):
        assert not stored[name].is_same_as(stored["base"])
    assert stored["one"].strides is None


def test_layouts_that_torch_writes(path):
    parameter = call(PARAMETER, PLAIN, b"\x88", ORDERED_DICT)
    plain_dict = b"}(" + text("w") + PLAIN + b"u"
    single = b"}" + text("w") + PLAIN + b"s"
    memoised = b"(" + text("w") + b"q\x05" + PLAIN + b"r\x06\0\0\0" + text("v") + b"h\x06u"
    for body in (
        state_dict({"w": PLAIN}),
        state_dict({"w": parameter}),
        plain_dict,
        single,
        ORDERED_DICT + b"q\x00" + memoised,
        b"}(" + text("epoch") + number(3) + text("state_dict") + plain_dict + b"u",
    ):
        write(path, pickled(body))
        np.testing.assert_array_equal(read_torch_file(path)["w"].read(), BASE)
    write(path, pickled(state_dict({"w": PLAIN})), root="opt", byteorder=None)
    assert list(read_torch_file(path)) == ["w"]


def test_protocol_4_is_read(path):
    def short(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    ordered = short("collections") + b"\x94" + short("OrderedDict") + b"\x94\x93\x94)R\x94"
    body = ordered + b"(" + short("w") + b"\x94" + PLAIN + b"u."
    write(path, b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body)
    assert read_torch_file(path)["w"].shape == (4, 6)


def test_a_pickle_without_end_and_a_huge_one(path):
    write(path, pickled(state_dict({"w": PLAIN}))[:-1])
    refused(path, "damaged pickle")
    write(path, b"")
    refused(path, "damaged pickle")
    write(path, b"N" * (1 << 24) + b"N")
    refused(path, r"data\.pkl has 16777217 bytes; expected at most 16777216")


def test_archives_that_torch_does_not_write(path, tmp_path):
    good = pickled(state_dict({"w": PLAIN}))
    write(path, good, compression=zipfile.ZIP_DEFLATED)
    refused(path, "archive/byteorder is compressed")
    write(path, good, byteorder=b"big")
    refused(path, "byte order b'big'; expected b'little'")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data/0", BASE.tobytes())
    refused(path, "expected one data.pkl in the archive, received 0")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", good)
        archive.writestr("b/data.pkl", good)
    refused(path, "received 2")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/b/data.pkl", good)
    refused(path, "not a torch file")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", good)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("archive/data.pkl", good)
    refused(path, "occurs twice")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", good)
        info = zipfile.ZipInfo("archive/data/0")
        info.compress_type = zipfile.ZIP_DEFLATED
        archive.writestr(info, BASE.tobytes())
    refused(path, "archive/data/0 is compressed")


def test_files_that_are_no_archive(path):
    path.write_bytes(pickle.dumps(0x1950A86A20F9469CFC6C, 2) + b"rest")
    refused(path, "damaged pickle")
    path.write_bytes(b"\x89HDF\r\n")
    refused(path, "not a torch file: expected a zip archive")
    path.write_bytes(b"PK\x03\x04")
    refused(path, "damaged or truncated zip archive")
    path.write_bytes(b"")
    refused(path, "empty")
    path.unlink()
    path.mkdir()
    refused(path, "expected a weight file")


def patched(content: bytes, at: int, value: bytes) -> bytes:
    return content[:at] + value + content[at + len(value) :]


def test_directories_that_lie(path):
    write(path, pickled(state_dict({"w": PLAIN})))
    content = path.read_bytes()
    entry = content.rindex(b"archive/data/0") - 46  # the storage's entry in the central directory
    assert content[entry : entry + 4] == b"PK\x01\x02"
    for offset, value, message in (
        (8, b"\1\0", "archive/data/0 is encrypted"),
        (24, struct.pack("<I", 200), "has two sizes"),
        (20, struct.pack("<II", 10**6, 10**6), "reaches past the end"),
        (20, struct.pack("<II", 8, 8), "expected 96 bytes, received 8"),
        (42, struct.pack("<I", 2**31), "not where the archive says"),
        (42, struct.pack("<I", 1), "not where the archive says"),
    ):
        path.write_bytes(patched(content, entry + offset, value))
        refused(path, message)
    pickle_entry = content.rindex(b"archive/data.pkl") - 46
    for offset, value, message in (
        (16, b"\0\0\0\0", r"archive/data\.pkl differs from its checksum"),
        (20, struct.pack("<II", 10**6, 10**6), r"archive/data\.pkl reaches past the end"),
        (42, struct.pack("<I", 1), r"archive/data\.pkl is not where the archive says"),
        (42, struct.pack("<I", len(content) - 4), r"archive/data\.pkl is not where"),
    ):
        path.write_bytes(patched(content, pickle_entry + offset, value))
        refused(path, message)
    end = content.rindex(b"PK\x05\x06")
    path.write_bytes(patched(content, end + 16, struct.pack("<I", 2**31)))
    refused(path)


def test_every_truncation_is_an_error(path):
    write(path, pickled(state_dict({"w": PLAIN})))
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        refused(path)


def test_every_damaged_byte_is_an_error_or_still_a_sound_file(path):
    write(path, pickled(state_dict({"w": PLAIN})))
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refusals = 0
    for position in range(len(content)):
        path.write_bytes(patched(content, position, bytes([int(rng.integers(256))])))
        try:
            for stored in read_torch_file(path).values():
                stored.read().sum()
        except CheckpointError:
            refusals += 1
    assert refusals > 200
