"""Drafts and what becomes of them: the part of speculative decoding that needs no framework."""

import numpy as np
import pytest

from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Request
from opt_core.generation.speculation import Rows, Slots, prompt_lookup


@pytest.mark.parametrize(
    ("text", "count", "longest", "expected"),
    [
        ([5, 6, 7, 8, 5, 6], 2, 2, [7, 8]),
        ([5, 6, 7, 8, 9, 6], 2, 2, [7, 8]),  # no pair occurs twice: the last token alone is found
        ([5, 6, 7, 9, 6, 8, 5, 6], 1, 1, [8]),  # the latest place of one
        ([5, 6, 7, 9, 6, 8, 5, 6], 1, 2, [7]),  # but a pair says more
        ([5, 6, 7, 5], 6, 2, [6, 7, 5, 6, 7, 5]),  # goes round where it reaches the end
        ([5, 5], 3, 2, [5, 5, 5]),
        ([5, 6, 7], 3, 2, []),
        ([5], 3, 2, []),
        ([5, 6, 5, 6], 1, 9, [5]),  # no room for nine
    ],
)
def test_drafts_follow_the_last_place(text, count, longest, expected):
    assert prompt_lookup(text, count, longest) == expected


def rows_of(ids, mask=None, new_tokens=6, **settings):
    ids = np.array(ids, np.int32)
    mask = np.ones(ids.shape, bool) if mask is None else np.array(mask, bool)
    return Rows(Request(ids, mask, GenerationConfig(**settings), new_tokens, 99, 99, 1))


def test_rows_take_what_counts_until_they_end():
    rows = rows_of([[5, 6], [1, 7]], [[1, 1], [0, 1]], eos_token_id=9, new_tokens=4)
    assert rows.texts == [[5, 6], [7]]
    assert rows.take(np.array([[8, 8, 8], [3, 9, 4]]), np.array([2, 3])).tolist() == [2, 2]
    assert rows.ended.tolist() == [False, True]
    assert rows.wanted.tolist() == [1, 0]
    assert rows.take(np.array([[3, 3, 3], [3, 3, 3]]), np.array([3, 3])).tolist() == [2, 0]
    assert rows.ended.all()
    assert rows.texts == [[5, 6, 8, 8, 3, 3], [7, 3, 9]]
    shown = np.stack(list(rows.columns()), 1)
    assert shown.tolist() == [[8, 8, 3, 3], [3, 9, 1, 1]]


def test_columns_wait_for_the_slowest_open_row():
    rows = rows_of([[5], [6], [7]], eos_token_id=9)
    rows.take(np.array([[3, 3, 3], [4, 4, 4], [9, 0, 0]]), np.array([3, 1, 1]))
    assert [column.tolist() for column in rows.columns()] == [[3, 4, 9]]
    rows.take(np.array([[3], [4], [0]]), np.array([1, 1, 1]))
    assert [column.tolist() for column in rows.columns()] == [[3, 4, 1]]
    assert list(rows.columns()) == []


def test_rows_draft_no_more_than_they_can_use():
    rows = rows_of([[5, 6, 5, 6], [7, 8, 9, 3]], new_tokens=3)
    draft, counts = rows.prompt_lookup(4, 2)
    assert counts.tolist() == [2, 0]
    assert draft[0, :2].tolist() == [5, 6]


def test_histories_end_where_their_token_is_chosen():
    rows = rows_of([[1, 1, 5], [1, 6, 7]], [[0, 0, 1], [0, 1, 1]])
    ids, real, made = rows.histories(np.array([[8, 9], [3, 4]], np.int32), 4)
    flat = zip(ids.reshape(6, 4), real.reshape(6, 4), strict=True)
    assert [row[is_real].tolist() for row, is_real in flat] == [
        [5], [5, 8], [5, 8, 9], [6, 7], [6, 7, 3], [6, 7, 3, 4],
    ]  # fmt: skip
    assert ids[:, :, -1].tolist() == [[5, 8, 9], [7, 3, 4]]
    assert made.tolist() == [[0, 1, 2]] * 2
    assert rows.positions(3, 1).tolist() == [[0, 1, 2], [1, 2, 3]]


def test_copies_are_rows_of_their_own():
    rows = rows_of([[5, 6]], num_return_sequences=2, do_sample=True)
    rows.take(np.array([[3], [4]]), np.array([1, 1]))
    assert rows.texts == [[5, 6, 3], [5, 6, 4]]


def test_slots_keep_and_close_gaps():
    slots = Slots(np.array([[False, True], [True, True]]), 8)
    content = np.array([[0, 1, 0, 0, 0, 0, 0, 0], [1, 2, 0, 0, 0, 0, 0, 0]])
    assert not slots.is_plain
    content[:, 2:5] = [[2, 3, 9], [3, 9, 9]]
    slots.keep(np.array([2, 1], np.int32))
    assert (slots.length, slots.mask.tolist()) == (
        4, [[False, True, True, True] + [True] * 4, [True, True, True, False] + [True] * 4]
    )  # fmt: skip
    content[:, 4:7] = [[9, 9, 9], [4, 5, 9]]
    slots.keep(np.array([0, 2], np.int32))
    assert slots.has_room(2)
    assert not slots.has_room(3)
    content = np.take_along_axis(content, slots.pack(), 1)
    assert slots.length == 5
    real = [row[keep].tolist() for row, keep in zip(content[:, :5], slots.mask[:, :5], strict=True)]
    assert real == [[1, 2, 3], [1, 2, 3, 4, 5]]
    assert slots.mask[:, 5:].all()
    assert slots.has_room(3)


def test_a_row_alone_has_no_gaps():
    slots = Slots(np.ones((1, 3), bool), 9)
    slots.keep(np.array([2], np.int32))
    assert slots.is_plain
    assert slots.length == 5
