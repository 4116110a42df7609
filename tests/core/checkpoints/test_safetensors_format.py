"""The safetensors reader and writer: round trips, and files made to mislead."""

import gc
import json
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opt_core.checkpoints.safetensors_format import (
    DTYPES,
    PendingTensor,
    read_safetensors,
    write_safetensors,
)
from opt_core.errors import CheckpointError
from tests.support.files.checkpoint_fixtures import safetensors_bytes


def pending(name: str, array: np.ndarray) -> PendingTensor:
    return PendingTensor(name, array.shape, array.dtype, lambda: array)


def every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {code: rng.integers(0, 2, (3, 5)).astype(dtype) for code, dtype in DTYPES.items()}
    del arrays["F8_E4M3"]  # which the library's NumPy reader looks for in NumPy
    return arrays


def test_every_data_type_survives_and_the_library_reads_it(tmp_path):
    arrays = every_dtype()
    path = tmp_path / "x.safetensors"
    # Narrow types first: in this order the wide ones would end up at odd addresses.
    write_safetensors(path, [pending(name, arrays[name]) for name in reversed(arrays)])
    ours, theirs = read_safetensors(path), load_file(path)
    for name, array in arrays.items():
        np.testing.assert_array_equal(ours[name].read(), array)
        np.testing.assert_array_equal(theirs[name], array)
        assert ours[name].dtype == array.dtype
        assert ours[name].offset % array.itemsize == 0
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors"}


def test_a_file_of_the_library_is_read(tmp_path):
    arrays = every_dtype()
    save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = read_safetensors(tmp_path / "x.safetensors")
    assert stored.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name].read(), array)


def test_transposed_strided_scalar_and_empty_arrays_are_written_as_they_look(tmp_path):
    base = np.arange(24, dtype=np.float32).reshape(4, 6)
    arrays = {
        "transposed": base.T,
        "strided": base[::2, 1::3],
        "reversed": base[::-1],
        "scalar": np.float32(3).reshape(()),
        "empty": base[:0],
        "expanded": np.broadcast_to(base[0], (3, 6)),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [pending(name, array) for name, array in arrays.items()])
    for read in (
        load_file(path),
        {name: stored.read() for name, stored in read_safetensors(path).items()},
    ):
        for name, array in arrays.items():
            np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("length", range(1, 70))
def test_the_data_starts_on_a_cache_line(tmp_path, length):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [pending("n" * length, np.ones(3, np.float32))])
    assert read_safetensors(path)["n" * length].offset % 64 == 0
    assert load_file(path)["n" * length].sum() == 3


def test_metadata_is_what_transformers_expects_unless_given(tmp_path):
    def metadata(path: Path) -> Any:
        data = path.read_bytes()
        return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])["__metadata__"]

    path = tmp_path / "x.safetensors"
    write_safetensors(path, [])
    assert metadata(path) == {"format": "pt"}
    write_safetensors(path, [], {"format": "pt", "by": "us"})
    assert metadata(path) == {"format": "pt", "by": "us"}


def test_tensors_are_fetched_one_at_a_time(tmp_path):
    live = 0
    most = 0

    class Counted(np.ndarray):
        def __del__(self) -> None:
            nonlocal live
            live -= self.base is None

    def fetch() -> np.ndarray:
        nonlocal live, most
        gc.collect()
        live += 1
        most = max(most, live)
        return Counted((100,), np.float32)

    dtype = np.dtype(np.float32)
    tensors = [PendingTensor(f"{i}", (100,), dtype, fetch) for i in range(5)]
    write_safetensors(tmp_path / "x.safetensors", tensors)
    assert most == 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.ones((3, 2), np.float32), r"a: expected float32 \[2, 3\], received float32 \[3, 2\]"),
        (np.ones((2, 3), np.float16), r"a: expected float32 \[2, 3\], received float16 \[2, 3\]"),
        (np.ones((2, 3), ">f4"), r"received >f4"),
    ],
)
def test_an_array_that_is_not_the_announced_one_leaves_no_file(tmp_path, array, message):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"before")
    tensor = PendingTensor("a", (2, 3), np.dtype(np.float32), lambda: array)
    with pytest.raises(CheckpointError, match=message):
        write_safetensors(path, [tensor])
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def test_names_and_types_that_cannot_be_written(tmp_path):
    path = tmp_path / "x.safetensors"
    ones = np.ones(2, np.float32)
    with pytest.raises(CheckpointError, match="a is to be written twice"):
        write_safetensors(path, [pending("a", ones), pending("a", ones)])
    with pytest.raises(CheckpointError, match="c: no safetensors type for complex64"):
        write_safetensors(path, [pending("c", ones.astype(np.complex64))])
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no file size limit to set")
def test_a_disk_that_refuses_leaves_no_file(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written: No such file or directory"):
        write_safetensors(tmp_path / "missing" / "x.safetensors", [])
    with pytest.raises(CheckpointError, match="cannot be written: File name too long"):
        write_safetensors(tmp_path / ("x" * 300), [])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="cannot be written: File too large"):
            write_safetensors(tmp_path / "x", [pending("a", np.ones(1 << 20, np.float32))])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DATA = b"\0" * 8


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": ENTRY | changes}


HOSTILE = {
    "no header": b"\0" * 4,
    "an empty header": safetensors_bytes(b"", b""),
    "not JSON": safetensors_bytes(b"{nope", DATA),
    "not an object": safetensors_bytes([1, 2], DATA),
    "deeply nested": safetensors_bytes(b"[" * 100_000, DATA),
    "a header longer than the file": safetensors_bytes(entry(), DATA, 10_000),
    "a header of 2^63 bytes": safetensors_bytes(entry(), DATA, 2**63),
    "a header of 2^64 bytes": safetensors_bytes(entry(), DATA, 2**64 - 1),
    "a header cut short": safetensors_bytes(entry(), DATA, 20),
    "truncated data": safetensors_bytes(entry(), DATA[:-1]),
    "spare data": safetensors_bytes(entry(), DATA + b"\0"),
    "no data": safetensors_bytes(entry(), b""),
    "offsets backwards": safetensors_bytes(entry(data_offsets=[8, 0]), DATA),
    "offsets outside": safetensors_bytes(entry(data_offsets=[8, 16]), DATA),
    "negative offsets": safetensors_bytes(entry(data_offsets=[-8, 0]), DATA),
    "three offsets": safetensors_bytes(entry(data_offsets=[0, 4, 8]), DATA),
    "a shape too large": safetensors_bytes(entry(shape=[3]), DATA),
    "a shape that overflows": safetensors_bytes(entry(shape=[2**62, 2**62, 4]), DATA),
    "a negative shape": safetensors_bytes(entry(shape=[-2]), DATA),
    "a fractional shape": safetensors_bytes(entry(shape=[2.5]), DATA),
    "an unknown type": safetensors_bytes(entry(dtype="Q4"), DATA),
    "an unsupported type": safetensors_bytes(entry(dtype="F8_E5M2", shape=[8]), DATA),
    "no type": safetensors_bytes({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA),
    "overlapping tensors": safetensors_bytes(
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, DATA + b"\0" * 4
    ),
    "the same bytes twice": safetensors_bytes({"a": ENTRY, "b": ENTRY}, DATA),
    "a hole": safetensors_bytes(entry(data_offsets=[8, 16]), DATA + DATA),
    "metadata that is no object": safetensors_bytes(entry() | {"__metadata__": 3}, DATA),
    "a repeated name": safetensors_bytes(
        b'{"a":%b,"a":%b}' % ((json.dumps(ENTRY).encode(),) * 2), DATA
    ),
    "a lone surrogate": safetensors_bytes(json.dumps({"\ud800": ENTRY}).encode(), DATA),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_misleading_file_is_one_clear_error(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: ") as caught:
        read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_an_unsupported_type_is_named(tmp_path):
    (tmp_path / "x").write_bytes(HOSTILE["an unsupported type"])
    with pytest.raises(CheckpointError, match="a has data type F8_E5M2; expected one of F64, F32"):
        read_safetensors(tmp_path / "x")


def test_every_truncation_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [pending("a", np.ones(3, np.float32)), pending("b", np.ones(2))])
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            read_safetensors(path)


def test_every_damaged_header_byte_is_an_error_or_still_a_sound_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, [pending("a", np.ones(3, np.float32)), pending("b", np.ones(2))])
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in range(8 + struct.unpack("<Q", content[:8])[0]):
        damaged = bytearray(content)
        damaged[position] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        try:
            for stored in read_safetensors(path).values():
                stored.read().sum()
        except CheckpointError:
            refused += 1
    assert refused > 100
