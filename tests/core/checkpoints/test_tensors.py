"""Reading through the map: nothing copied, nothing kept, nothing written back."""

import gc
import os
import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from opt_core.checkpoints.tensors import (
    FLOAT_DTYPES,
    StoredTensor,
    TensorFile,
    cast_array,
    float_dtype,
)
from opt_core.errors import CheckpointError

FLOAT32 = np.dtype(np.float32)
MIB = 1 << 20
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")


@pytest.fixture
def numbers(tmp_path: Path) -> tuple[np.ndarray, StoredTensor]:
    """An array, and the same one in a file of 16 MiB."""
    array = np.arange(4 * MIB, dtype=np.float32).reshape(2048, 2048)
    array.tofile(tmp_path / "numbers")
    return array, StoredTensor("x", array.shape, FLOAT32, TensorFile(tmp_path / "numbers"), 0)


def resident(kind: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"{kind}:\s+(\d+) kB", status)[0])


def test_a_read_is_a_writable_view_that_never_reaches_the_file(numbers, tmp_path):
    array, stored = numbers
    view = stored.read()
    np.testing.assert_array_equal(view, array)
    assert np.shares_memory(view, stored.read())
    view[:] = -1
    np.testing.assert_array_equal(np.fromfile(tmp_path / "numbers", np.float32), array.ravel())


@linux_only
def test_reading_takes_no_memory_of_its_own_and_gives_the_pages_back(numbers):
    _, stored = numbers
    gc.collect()
    mapped, anonymous = resident("RssFile"), resident("RssAnon")
    view = stored.read()
    assert view[:, ::512].sum() > 0  # touches every page
    assert resident("RssFile") - mapped > 12 * MIB
    assert resident("RssAnon") - anonymous < 4 * MIB
    del view
    gc.collect()
    assert resident("RssFile") - mapped < 4 * MIB


@linux_only
def test_a_neighbour_in_the_same_page_does_not_keep_the_rest(numbers):
    _, stored = numbers
    size = stored.nbytes // 4
    before, large, after = (
        StoredTensor("x", (stop - start,), FLOAT32, stored.source, 4 * start)
        for start, stop in ((0, 100), (100, size - 100), (size - 100, size))
    )
    gc.collect()
    mapped = resident("RssFile")
    kept, view = (before.read(), after.read()), large.read()
    kept[0][:] = kept[1][:] = -1
    view[::512].sum()
    del view
    gc.collect()
    assert resident("RssFile") - mapped < 4 * MIB
    assert (kept[0] == -1).all()
    assert (kept[1] == -1).all()


def test_pages_are_kept_while_any_view_of_them_lives(numbers):
    array, stored = numbers
    view = stored.read()
    part = view[100:200].reshape(-1)[7:]
    part[:] = 5
    del view
    other = stored.read()
    del other
    gc.collect()
    assert (part == 5).all()
    del part
    gc.collect()
    np.testing.assert_array_equal(stored.read(), array)


def test_the_opened_file_is_read_even_when_its_name_is_given_to_another(numbers, tmp_path):
    array, stored = numbers
    (tmp_path / "other").write_bytes(b"\xff" * array.nbytes)
    (tmp_path / "other").replace(tmp_path / "numbers")
    np.testing.assert_array_equal(stored.read(), array)


def test_strides_scalars_and_empty_tensors(numbers):
    array, stored = numbers
    source = stored.source

    def read(shape: tuple[int, ...], offset: int = 0, strides: tuple[int, ...] | None = None):
        return StoredTensor("x", shape, FLOAT32, source, 4 * offset, strides).read()

    np.testing.assert_array_equal(read((2048, 2048), strides=(1, 2048)), array.T)
    np.testing.assert_array_equal(read((3, 2), 5, (2048, 2)), array[:3, 5:9:2])
    np.testing.assert_array_equal(read((2, 3), 9, (0, 1)), np.broadcast_to([9.0, 10, 11], (2, 3)))
    assert read((), 7) == 7
    assert read((0, 4)).shape == (0, 4)
    assert read((0, 4), strides=(9**9, 9**9)).shape == (0, 4)


@pytest.mark.parametrize("strides", [None, (1, 2048)])
def test_rows_are_the_same_as_slices(numbers, strides):
    array, stored = numbers
    if strides:
        array = array.T
    stored = StoredTensor("x", array.shape, FLOAT32, stored.source, 0, strides)
    for start, stop in ((0, 1), (5, 9), (2040, 5000), (0, 2048)):
        np.testing.assert_array_equal(stored.rows(start, stop).read(), array[start:stop])


def test_a_tensor_at_an_odd_address_is_copied(tmp_path):
    (tmp_path / "odd").write_bytes(b"\0" + np.arange(5, dtype=np.float32).tobytes())
    array = StoredTensor("x", (5,), FLOAT32, TensorFile(tmp_path / "odd"), 1).read()
    assert array.flags.aligned
    np.testing.assert_array_equal(array, np.arange(5))


@pytest.mark.parametrize(
    ("shape", "offset", "strides"),
    [
        ((2048, 2049), 0, None),
        ((2048, 2048), 4, None),
        ((1,), -4, None),
        ((-1,), 0, None),
        ((2, 2), 0, (1 << 22, 1)),
        ((2, 2), 0, (-1, 1)),
        ((2**40, 2**40), 0, (0, 0)),
    ],
)
def test_a_tensor_outside_its_file_is_refused(numbers, shape, offset, strides):
    with pytest.raises(CheckpointError, match="numbers: x"):
        StoredTensor("x", shape, FLOAT32, numbers[1].source, offset, strides)


def test_what_is_no_weight_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n"
    (tmp_path / "pointer").write_bytes(pointer)
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "folder": "expected a weight file",
        "pipe": "expected a weight file",
        "empty": "empty",
        "loop": "loop",
        "dangling": "leads nowhere",
        "missing": "no such file",
        "pointer": "git lfs pull",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            TensorFile(tmp_path / name)


@linux_only
def test_a_file_larger_than_memory_can_be_mapped(tmp_path):
    size = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    stored = StoredTensor("x", (16,), FLOAT32, TensorFile(tmp_path / "sparse"), size - 64)
    assert not stored.read().any()


def bits(values: np.ndarray) -> list[int]:
    return values.view(np.uint16).tolist()


def test_casting_to_bfloat16_rounds_to_nearest_even():
    # One, the two ties around it, and their neighbours on either side.
    patterns = [0x3F800000, 0x3F807FFF, 0x3F808000, 0x3F808001, 0x3F817FFF, 0x3F818000, 0x3F818001]
    array = np.array([*patterns, 0x7F800000], np.uint32).view(np.float32)
    rounded = cast_array("x", array, FLOAT_DTYPES["bfloat16"])
    assert bits(rounded) == [0x3F80, 0x3F80, 0x3F80, 0x3F81, 0x3F81, 0x3F82, 0x3F82, 0x7F80]


@pytest.mark.parametrize("target", FLOAT_DTYPES)
@pytest.mark.parametrize("source", FLOAT_DTYPES)
def test_every_cast_agrees_with_the_rounded_value(source, target):
    rng = np.random.default_rng(0)
    array = rng.normal(size=(300, 7)).astype(FLOAT_DTYPES[source])[:, ::2]
    result = cast_array("x", array, FLOAT_DTYPES[target])
    assert result.dtype == FLOAT_DTYPES[target]
    expected = array.astype(np.float64).astype(FLOAT_DTYPES[target])
    np.testing.assert_array_equal(result.astype(np.float64), expected.astype(np.float64))
    assert (result is array) == (source == target)


def test_a_large_bfloat16_tensor_is_cast_by_rows(monkeypatch):
    monkeypatch.setattr("opt_core.checkpoints.tensors._CAST_ROWS_BYTES", 64)
    array = np.arange(105, dtype=np.float32).reshape(35, 3).astype(ml_dtypes.bfloat16)
    result = cast_array("x", array, FLOAT_DTYPES["float16"])
    np.testing.assert_array_equal(result, array.astype(np.float16))


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float64"])
def test_a_value_out_of_range_is_an_error_and_infinity_is_not(source):
    array = np.array([1.0, 1e6]).astype(FLOAT_DTYPES[source])
    with pytest.raises(CheckpointError, match=r"w\.weight: values beyond the range of float16"):
        cast_array("w.weight", array, FLOAT_DTYPES["float16"])
    infinite = np.array([np.inf, -np.inf]).astype(FLOAT_DTYPES[source])
    assert np.isinf(cast_array("x", infinite, FLOAT_DTYPES["float16"])).all()


def test_a_data_type_weights_cannot_have():
    with pytest.raises(CheckpointError, match=r"expected one of float32, .* received 'int8'"):
        float_dtype("int8")
