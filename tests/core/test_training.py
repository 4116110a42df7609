"""Training settings and batches."""

import itertools
import math

import numpy as np
import pytest

from opt_core.data import token_batches, token_windows
from opt_core.errors import ConfigError, InputError
from opt_core.training import TrainConfig


def test_the_learning_rate_rises_and_falls():
    config = TrainConfig(max_steps=110, warmup_steps=10, learning_rate=1.0, min_lr_ratio=0.1)
    rates = [config.learning_rate_at(step) for step in range(111)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) / 10)
    assert rates[10] == 1.0
    np.testing.assert_allclose(rates[60], 0.55)
    np.testing.assert_allclose(rates[110], 0.1)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_other_schedules():
    linear = TrainConfig(max_steps=100, lr_schedule="linear", learning_rate=1.0, min_lr_ratio=0.0)
    np.testing.assert_allclose(linear.learning_rate_at(25), 0.75)
    constant = TrainConfig(max_steps=100, lr_schedule="constant", learning_rate=0.5)
    assert constant.learning_rate_at(99) == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "max_steps: expected an integer >= 1"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"sequence_length": 1}, "sequence_length"),
        ({"learning_rate": 0}, "learning_rate: expected a number > 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"weight_decay": 1.5}, "weight_decay"),
        ({"adam_beta2": -0.1}, "adam_beta2"),
        ({"lr_schedule": "exponential"}, "lr_schedule"),
        ({"warmup_steps": 2000}, "warmup_steps=2000 exceeds max_steps=1000"),
    ],
    ids=str,
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)


def test_batches_are_windows_of_the_stream_and_repeatable():
    stream = np.arange(100)
    batches = list(itertools.islice(token_batches(stream, 4, 7, seed=1), 50))
    again = list(itertools.islice(token_batches(stream, 4, 7, seed=1), 50))
    assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))
    assert all((np.diff(b) == 1).all() for b in batches)
    assert {int(row[0]) for b in batches for row in b} >= {0, 93}, (
        "the first or last window is missed"
    )
    assert batches[0].dtype == np.int32


def test_windows_cover_the_stream_once():
    rows = np.concatenate(list(token_windows(np.arange(103), 4, 10)))
    np.testing.assert_array_equal(rows.ravel(), np.arange(100))


def test_a_stream_shorter_than_a_window():
    with pytest.raises(InputError, match="5 tokens is shorter than sequence_length=7"):
        next(token_batches(np.arange(5), 1, 7))
