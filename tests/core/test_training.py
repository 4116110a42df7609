"""Training settings."""

import itertools
import math

import numpy as np
import pytest

from opt_core.errors import ConfigError
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
        ({"adam_beta1": 1.0}, "adam_beta1: expected 0 <= x < 1"),
        ({"learning_rate": "1e-4"}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"lr_schedule": "exponential"}, "lr_schedule"),
        ({"warmup_steps": 2000}, "warmup_steps=2000 exceeds max_steps=1000"),
    ],
    ids=str,
)
def test_bad_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)
