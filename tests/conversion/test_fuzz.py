"""Sound files with bytes changed at random: read, or refused with an OPTError; nothing else.

OPT_FUZZ_EXAMPLES=5000 looks for longer than every test run does.
"""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("torch")

import conversion
from opt_core.errors import OPTError
from tests.support.files.checkpoint_fixtures import random_weights
from tests.support.files.format_fixtures import make
from tests.support.files.metaseq_fixtures import EVEN, write_metaseq
from tests.support.hostile.corpus import FILES, SECONDS, used

EXAMPLES = int(os.environ.get("OPT_FUZZ_EXAMPLES", "0"))
# An HDF5 file takes a process.
USUAL = {"tf-h5": 8, "keras-hub": 8}

EXTREMES = [
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\0" * 8,
    b"\xff" * 8,
    b"\xff" * 4,
    b"\x7f" + b"\xff" * 7,
]
change = st.one_of(
    st.tuples(st.just("set"), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    st.tuples(st.just("set"), st.floats(0, 1), st.sampled_from(EXTREMES)),
    st.tuples(st.just("add"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
    st.tuples(st.just("twice"), st.floats(0, 1), st.binary(min_size=1, max_size=40)),
)


def changed(data: bytes, changes: list[tuple[str, float, bytes]], heads: list[int]) -> bytes:
    for how, where, new in changes:
        # Half of all changes go where the structure is, not the values.
        at = int(where * len(data))
        if int(where * 1e6) % 2:
            at = heads[int(where * len(heads)) % len(heads)] + int(where * 1e9) % 24
        if how == "set":
            data = data[:at] + new + data[at + len(new) :]
        elif how == "add":
            data = data[:at] + new + data[at:]
        elif how == "cut":
            data = data[:at] + data[at + len(new) :]
        else:
            data = data[:at] + data[at : at + len(new)] + data[at:]
    return data


def heads_of(data: bytes) -> list[int]:
    """Where the structure is: signatures, names, and the two ends."""
    found = [0, 8, 96, len(data) - 64, len(data) - 22]
    for mark in (
        b"PK",
        b"TREE",
        b"SNOD",
        b"HEAP",
        b"OHDR",
        b"_",
        b"layer",
        b"float",
        b"\xc7",
        b"q",
    ):
        at = data.find(mark)
        while at >= 0 and len(found) < 3000:
            found.append(max(0, at - 8))
            at = data.find(mark, at + 1)
    return sorted({max(0, at) for at in found})


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fuzz")
    make(root / "source")
    for kind in FILES:
        conversion.convert(root / "source", root / kind, kind)
    write_metaseq(root / "metaseq in parts", EVEN, random_weights(EVEN), 2, 2)
    return root


PART = "checkpoint_last-model_part-1-shard0.pt"


@pytest.mark.parametrize("kind", [*FILES, "metaseq in parts"])
def test_any_change_is_read_or_refused(kind: str, sound: Path):
    folder, target = sound / kind, sound / f"{kind}-new"
    file = folder / FILES.get(kind, PART)
    original = file.read_bytes()
    heads = heads_of(original)

    @settings(
        max_examples=EXAMPLES or USUAL.get(kind, 150),
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        derandomize=not EXAMPLES,
    )
    @given(st.lists(change, min_size=1, max_size=4))
    def run(changes: list[tuple[str, float, bytes]]) -> None:
        file.unlink()  # maps of the last one stay what they are
        file.write_bytes(changed(original, changes, heads))
        began = used()
        try:
            conversion.convert(folder, target)
        except OPTError as error:
            told = str(error)
        else:
            told = str(folder)
        shutil.rmtree(target, ignore_errors=True)
        assert str(folder) in told or "values beyond the range" in told
        assert used() - began < SECONDS
        assert {p.name for p in sound.iterdir()} == {*FILES, "metaseq in parts", "source"}

    run()
