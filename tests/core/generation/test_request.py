"""Requests: what is refused before anything is computed, and what a program is made for."""

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import (
    Request,
    allocate_tokens,
    bucket,
    check_export,
    check_logits,
    check_request,
    merge_settings,
)

CONFIG = OPTConfig()
DEFAULTS = GenerationConfig(eos_token_id=2, pad_token_id=1, bos_token_id=2)


def checked(ids, mask=None, defaults=DEFAULTS, seed=0, **settings):
    ids, mask = np.array(ids, np.int32), None if mask is None else np.array(mask, bool)
    return check_request(CONFIG, defaults, ids, mask, None, seed, None, **settings)


@pytest.mark.parametrize(
    ("length", "slots"), [(1, 32), (32, 32), (33, 64), (256, 256), (257, 512), (2048, 2048)]
)
def test_buckets(length, slots):
    assert bucket(length) == slots


def test_padding_is_found_where_an_id_means_nothing_else():
    mask = checked([[1, 5], [6, 7]]).mask
    assert mask is not None
    assert mask.tolist() == [[False, True], [True, True]]
    assert checked([[5, 6]]).mask is None
    assert checked([[1, 5]], [[1, 1]]).mask is None
    assert checked([[2, 5]], pad_token_id=2).mask is None
    with pytest.raises(GenerationError, match="prompt 1 ends in padding; pad on the left"):
        checked([[5, 6], [7, 1]])


def test_a_row_is_filled_with_the_first_id_that_is_named():
    nothing = GenerationConfig()
    bare = OPTConfig(pad_token_id=None)
    ids = np.array([[5]], np.int32)
    assert checked([[5]], pad_token_id=7).pad == 7
    assert checked([[5]], defaults=nothing).pad == 1
    for settings, pad in ((nothing.replace(eos_token_id=(9, 8)), 9), (nothing, 0)):
        assert check_request(bare, settings, ids, None, None, 0, None).pad == pad


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, None])
def test_seeds(seed):
    with pytest.raises(GenerationError, match=r"seed: expected an integer in 0..2\*\*63 - 1"):
        checked([[5]], seed=seed)


def test_special_ids_come_from_the_model_where_they_are_open():
    merged = merge_settings(DEFAULTS, GenerationConfig(eos_token_id=9), top_k=3)
    assert (merged.eos_token_id, merged.pad_token_id, merged.top_k) == (9, 1, 3)
    with pytest.raises(GenerationError, match="expected a GenerationConfig, received list"):
        merge_settings(DEFAULTS, [])  # type: ignore[arg-type]


def test_rows_get_free_slots_behind_them():
    request = checked([[1, 5], [6, 7]], max_new_tokens=1)
    ids, mask = allocate_tokens(request, 4, copies=2)
    assert ids.tolist() == [[1, 5, 1, 1]] * 2 + [[6, 7, 1, 1]] * 2
    assert mask.tolist() == [[False, True, True, True]] * 2 + [[True] * 4] * 2
    assert request.slots == 64


@pytest.mark.parametrize(
    ("length", "past", "chunk", "expected"),
    [
        (9, None, None, None), (9, None, 4, 4), (9, None, 9, None), (9, None, 20, None),
        (9, 3, None, 9), (9, 3, 4, 4), (90, 3, None, 90), (90, 80, None, 32),
    ],
)  # fmt: skip
def test_chunks(length, past, chunk, expected):
    class Cache:
        length = past

    settings = GenerationConfig(prefill_chunk_size=chunk)
    held = None if past is None else Cache()
    ids = np.zeros((1, length), np.int32)
    assert Request(ids, None, settings, 1, 9, 9, 1, past=held).chunk == expected


def test_rows_without_a_possible_token():
    check_logits(np.array([0.0, -5.0]))
    with pytest.raises(GenerationError, match=r"row 1: .* every token is banned"):
        check_logits(np.array([0.0, -np.inf]))
    with pytest.raises(GenerationError, match=r"row 0: .* the logits are NaN"):
        check_logits(np.array([np.nan, 0.0]))


def test_exports_need_a_length_and_no_stop_strings():
    request = check_export(CONFIG, DEFAULTS, 8, None, None, max_new_tokens=4)
    assert (request.ids.shape, request.new_tokens, request.pad) == ((1, 8), 4, 1)
    with pytest.raises(GenerationError, match="max_new_tokens: an export needs it"):
        check_export(CONFIG, DEFAULTS, 8, None, None)
    with pytest.raises(GenerationError, match="stop_strings cannot be exported"):
        check_export(CONFIG, DEFAULTS, 8, None, None, max_new_tokens=4, stop_strings="x")


def test_without_a_length_there_are_twenty_new_tokens_within_the_window():
    with pytest.warns(UserWarning, match="no length was asked for: 20 new tokens at most"):
        assert checked([[1, 5]], max_new_tokens=None).new_tokens == 20
    long = [[5] * (CONFIG.max_position_embeddings - 2)]
    with pytest.warns(UserWarning, match="3 new tokens at most"):
        assert checked(long, max_new_tokens=None).new_tokens == 3
