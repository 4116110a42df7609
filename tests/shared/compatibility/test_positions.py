"""The position table, called with a mask as code written for `transformers` calls it."""

import numpy as np
import pytest

from opt_core.errors import InputError
from opt_core.params import POSITION_OFFSET, param_specs
from tests.support.configs import CONFIGS

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
MASK = np.array([[0, 1, 1, 1], [1, 1, 1, 0]], np.int32)
ROWS = np.array([[1, 2, 3, 4], [2, 3, 4, 1]])
"""Of a mask: a token's position is the number of tokens before it, padding has position -1."""


@pytest.fixture
def positions(backend, load):
    return load(CONFIG).get_decoder().embed_positions


@pytest.fixture
def table(backend, load):
    model = load(CONFIG)
    specs = {spec.name: spec for spec in param_specs(CONFIG, "causal_lm")}
    spec = specs["model.decoder.embed_positions.weight"]
    return np.array(backend.numpy(model.backend.checkpoint.get_parameter(model, spec)))


def test_rows_follow_from_a_mask(backend, positions, table):
    mask = backend.array(MASK)
    np.testing.assert_array_equal(backend.numpy(positions(mask)), table[ROWS])
    for past in (1, 3):
        found = positions(mask, past_key_values_length=past)
        np.testing.assert_array_equal(backend.numpy(found), table[ROWS[:, past:]])


def test_positions_of_the_callers_own_and_rows(backend, positions, table):
    given, mask = backend.array(np.array([[5, -1]], np.int32)), backend.array(MASK)
    found = backend.numpy(positions(mask, 0, position_ids=given))
    np.testing.assert_array_equal(found, table[[[5 + POSITION_OFFSET, 1]]])
    rows = backend.numpy(positions(backend.array(ROWS[:, :2].astype(np.int32)), None))
    np.testing.assert_array_equal(rows, table[ROWS[:, :2]])


def test_positions_in_the_place_of_a_mask_are_refused(backend, positions):
    with pytest.raises(InputError, match=r"attention_mask: .*passed as position_ids="):
        positions(backend.array(ROWS.astype(np.int32)))
