"""Batches: every example once an epoch, and a position that can be saved and found again."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.data.batches import Batches
from opt_core.data.token_blocks import TokenBlocks, write_blocks
from opt_core.errors import DataError


@pytest.fixture
def blocks(tmp_path: Path) -> TokenBlocks:
    """Ten blocks, each of its own number."""
    write_blocks(tmp_path / "blocks", [np.repeat(np.arange(10), 4)], 4, 99)
    return TokenBlocks.open(tmp_path / "blocks")


def numbers(batches: Any) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in batches]


def stream(batches: Any) -> list[int]:
    return list(chain.from_iterable(numbers(batches)))


def test_in_order_every_block_once(blocks: TokenBlocks):
    batches = list(Batches(blocks, 4, 0, shuffle=False, epochs=1))
    assert numbers(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batches[0]["input_ids"].shape == (4, 4)
    assert batches[0]["input_ids"].dtype == batches[0]["labels"].dtype == np.int32
    assert np.array_equal(batches[0]["input_ids"], batches[0]["labels"])
    batches[0]["labels"][0] = -100
    assert batches[0]["input_ids"][0, 0] == 0


def test_each_epoch_has_an_order_of_its_own(blocks: TokenBlocks):
    rows = stream(Batches(blocks, 4, 0, epochs=3))
    epochs = [rows[:10], rows[10:20], rows[20:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in [*epochs, range(10)]}) == 4
    assert stream(Batches(blocks, 4, 0, epochs=3)) == rows
    assert stream(Batches(blocks, 4, 1, epochs=3)) != rows


def test_without_an_end_batches_are_full_even_from_a_small_source(blocks: TokenBlocks):
    batches = Batches(blocks, 25, 0)
    assert [len(next(batches)["input_ids"]) for _ in range(5)] == [25] * 5
    assert batches.state()["epoch"] == 12


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_share_the_same_global_batches(blocks: TokenBlocks, hosts: int):
    whole = Batches(blocks, 8, 3)
    parts = [Batches(blocks, 8, 3, host=host, hosts=hosts) for host in range(hosts)]
    for _ in range(7):
        rows = [next(part)["input_ids"] for part in parts]
        assert all(len(part) == 8 // hosts for part in rows)
        assert np.array_equal(np.concatenate(rows), next(whole)["input_ids"])


@pytest.mark.parametrize("done", [0, 1, 2, 3, 7])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_run_resumes_at_the_very_next_batch_on_any_number_of_hosts(
    blocks: TokenBlocks, done: int, shuffle: bool
):
    before = [Batches(blocks, 4, 5, shuffle, host=host, hosts=2) for host in range(2)]
    for _ in range(done):
        for part in before:
            next(part)
    states = [json.loads(json.dumps(part.state())) for part in before]
    assert states[0] == states[1]
    after = Batches(blocks, 4, 5, shuffle)
    after.restore(states[0])
    undisturbed = Batches(blocks, 4, 5, shuffle)
    for _ in range(done):
        next(undisturbed)
    for _ in range(5):
        assert np.array_equal(next(after)["input_ids"], next(undisturbed)["input_ids"])
    assert after.state() == undisturbed.state()


def test_the_end_is_an_end_after_restoring_too(blocks: TokenBlocks):
    batches = Batches(blocks, 4, 0, epochs=1)
    list(batches)
    other = Batches(blocks, 4, 0, epochs=1)
    other.restore(batches.state())
    assert list(other) == []


def test_hosts_end_together(blocks: TokenBlocks):
    parts = [Batches(blocks, 8, 0, shuffle=False, epochs=1, host=h, hosts=4) for h in range(4)]
    counts = [[len(batch["input_ids"]) for batch in part] for part in parts]
    assert counts == [[2]] * 4  # two blocks are left: not one for each
    parts = [Batches(blocks, 4, 0, shuffle=False, epochs=1, host=h, hosts=2) for h in range(2)]
    assert [numbers(part)[-1] for part in parts] == [[8], [9]]


def test_labelled_texts_keep_their_names():
    examples = [
        {"input_ids": np.arange(3), "attention_mask": np.ones(3, np.int64), "labels": i % 2}
        for i in range(5)
    ]
    batch = next(Batches(examples, 4, 0, shuffle=False))
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "input_ids": ((4, 3), np.int32),
        "attention_mask": ((4, 3), np.int32),
        "labels": ((4,), np.int32),
    }
    assert batch["labels"].tolist() == [0, 1, 0, 1]
    scores = next(Batches([{"labels": np.float32(0.5)}], 1, 0))
    assert scores["labels"].dtype == np.float32
    with pytest.raises(DataError, match="differ in their names or shapes"):
        next(Batches([{"input_ids": [1]}, {"input_ids": [1, 2]}], 2, 0, shuffle=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": []}, "expected examples, received none"),
        ({"batch_size": 0}, "batch_size=0 must be a multiple"),
        ({"batch_size": 3, "hosts": 2}, "batch_size=3 must be a multiple"),
        ({"host": 2, "hosts": 2}, r"host: expected 0\.\.1, received 2"),
        ({"epochs": 0}, "epochs: expected at least 1, received 0"),
        ({"seed": -1}, "seed: expected an integer >= 0, received -1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(arguments: dict[str, Any], message: str):
    defaults: dict[str, Any] = {"source": [np.arange(3)], "batch_size": 2, "seed": 0}
    with pytest.raises(DataError, match=message):
        Batches(**defaults | arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 9}, "saved with seed=9, this run has seed=0: another order"),
        ({"examples": 11}, "saved with examples=11, this run has examples=10"),
        ({"shuffle": 0}, "saved with shuffle=0"),
        ({"examples_seen": None}, "examples_seen: expected a number, found None"),
        ({"batch": -1}, "batch: expected a number, found -1"),
    ],
)
def test_a_position_in_other_data_is_refused(
    blocks: TokenBlocks, change: dict[str, Any], message: str
):
    batches = Batches(blocks, 4, 0)
    with pytest.raises(DataError, match=message):
        batches.restore(batches.state() | change)
