"""The cache: however a sequence is cut into calls, the numbers are those of one uncached pass."""

import itertools

import numpy as np
import pytest

from opt_core.errors import InputError
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered

pytestmark = pytest.mark.dealt

SAME = 2e-5
"""Cached against uncached logits: the same sums in another order."""
LENGTH = 12
MASKS = {
    "bare": None,
    "left": make_mask("left", [LENGTH, 7, 2]),
    "holes": np.array([[1] * LENGTH, [0, 1, 1, 0] * 3, [1, 1, 0] * 4]),
}


CUTS = [4, 8, 9, 10, 11]
"""A prompt, a piece that continues it, then token by token: two shapes in all."""
CASES = [
    case
    for case in itertools.product(
        CONFIGS, MASKS, [CUTS, [6], [5, 6, 7, 8, 9, 10, 11], [1, 4, 11]], [True, False],
        ["sdpa", "eager"],
    )
    if case[1] != "bare" or case[3]  # no mask is neither whole nor in parts
]  # fmt: skip


def is_fast(variant, mask, cuts, whole_mask, attention):
    """Everything on one model, and what is likeliest to differ on the others."""
    typical = (("left", True, "sdpa"), ("holes", False, "eager"))
    return cuts == CUTS and (variant == "pre_ln" or (mask, whole_mask, attention) in typical)


def in_pieces(backend, model, ids, mask, cuts, whole_mask, slots=LENGTH):
    """Logits of all tokens, computed piece by piece through a cache."""
    cache, logits, start = model.init_cache(len(ids), slots), [], 0
    for end in [*cuts, ids.shape[1]]:
        given = {}
        if mask is not None:
            given = {"attention_mask": mask[:, :end] if whole_mask else mask[:, start:end]}
        out = backend.run(model, input_ids=ids[:, start:end], past_key_values=cache, **given)
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return np.concatenate(logits, 1)


@pytest.mark.parametrize(
    ("variant", "mask", "cuts", "whole_mask", "attention"), tiered(CASES, is_fast), ids=str
)
def test_pieces_equal_the_whole(backend, load, variant, mask, cuts, whole_mask, attention):
    mask = MASKS[mask]
    ids = make_prompts(CONFIGS[variant], 3, LENGTH)
    model = load(variant, attn_implementation=attention)
    whole = backend.run(model, input_ids=ids, attention_mask=mask).logits
    pieces = in_pieces(backend, model, ids, mask, cuts, whole_mask)
    seen = np.ones_like(ids, bool) if mask is None else np.cumsum(mask, 1) > 0
    np.testing.assert_allclose(pieces[seen], whole[seen], rtol=0, atol=SAME)


def test_free_slots_change_nothing(backend, load):
    ids = make_prompts(CONFIGS["pre_ln"], 3, LENGTH)
    model = load("pre_ln")
    exact = in_pieces(backend, model, ids, None, CUTS, True)
    roomy = in_pieces(backend, model, ids, None, CUTS, True, slots=50)
    np.testing.assert_allclose(roomy, exact, rtol=0, atol=SAME)


def test_padding_changes_no_row(backend, load):
    """A left-padded row equals the row alone, through the cache too."""
    lengths = [LENGTH, 4, 1]  # shapes that are compiled anyhow, with the copies below
    ids = make_prompts(CONFIGS["post_ln"], 3, LENGTH)
    model = load("post_ln")
    padded = in_pieces(backend, model, ids, make_mask("left", lengths), CUTS, False)
    for row, length in enumerate(lengths):
        alone = backend.run(model, input_ids=ids[[row] * 3, -length:]).logits
        np.testing.assert_allclose(padded[row, -length:], alone[0], rtol=0, atol=SAME)


def test_explicit_positions_with_a_cache(backend, load):
    ids = make_prompts(CONFIGS["pre_ln"], 3, LENGTH)[:, :8]
    positions = np.arange(8)[None].repeat(3, 0) * 3
    model = load("pre_ln")
    whole = backend.run(model, input_ids=ids, position_ids=positions).logits
    first = backend.run(
        model,
        input_ids=ids[:, :4],
        position_ids=positions[:, :4],
        past_key_values=model.init_cache(3, LENGTH),
    )
    second = backend.run(
        model,
        input_ids=ids[:, 4:],
        position_ids=positions[:, 4:],
        past_key_values=first.past_key_values,
    )
    np.testing.assert_allclose(
        np.concatenate([first.logits, second.logits], 1), whole, rtol=0, atol=SAME
    )


def test_a_full_cache_is_an_error(load):
    model = load("pre_ln")
    out = model(make_prompts(CONFIGS["pre_ln"], 3, 4), past_key_values=model.init_cache(3, 5))
    with pytest.raises(InputError, match="5 slots; 4 are taken and 2 more"):
        model(np.array([[5, 6]] * 3), past_key_values=out.past_key_values)


def test_a_cache_of_other_rows_is_an_error(load):
    model = load("pre_ln")
    with pytest.raises(InputError, match="holds 2 rows, the input has 3"):
        model(make_prompts(CONFIGS["pre_ln"], 3, 4), past_key_values=model.init_cache(2, 5))


def test_a_cache_needs_free_slots(load):
    with pytest.raises(InputError, match="at least 1 row and 1 slot"):
        load("pre_ln").init_cache(2, 0)


def test_a_cache_of_another_model(load):
    deeper = CONFIGS["pre_ln"].replace(num_hidden_layers=3)
    cache = load(deeper).init_cache(1, 8)
    with pytest.raises(InputError, match="past_key_values is of another model: expected"):
        load("pre_ln")([[2, 5]], past_key_values=cache)


def test_a_cache_is_not_resized_to_less_than_it_holds(load):
    model, ids = load("pre_ln"), make_prompts(CONFIGS["pre_ln"], 3, 4)
    cache = model(ids, past_key_values=model.init_cache(3, 5)).past_key_values
    assert cache.resize(3, 4).max_length == 4
    with pytest.raises(InputError, match=r"holds 3 rows of 4 tokens, .* there are 3 slots"):
        cache.resize(3, 3)
    with pytest.raises(InputError, match="holds 3 rows of 4 tokens, the input has 4 rows"):
        cache.resize(4, 6)
