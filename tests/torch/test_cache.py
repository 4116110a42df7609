"""Key-value caches, whose buffers are shared with their successors."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from opt_core.errors import InputError  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_prompts  # noqa: E402
from tests.support.torch_models import model_of  # noqa: E402


def test_a_cache_is_continued_once(folder):
    """Buffers are shared with the successor: a second continuation would overwrite the first."""
    model, ids = (
        model_of(folder),
        make_prompts(CONFIGS["pre_ln"], 1, 6),
    )
    first = model(ids[:, :4], past_key_values=model.init_cache(1, 10))
    model(ids[:, 4:5], past_key_values=first.past_key_values)
    with pytest.raises(InputError, match=r"continued already \(it holds 4 tokens, .* 5\)"):
        model(ids[:, 5:], past_key_values=first.past_key_values)


def test_going_back_uses_the_others_up(folder):
    """They are on the same buffers: what follows a cropped cache overwrites what they hold."""
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 6)
    first = model(ids[:, :4], past_key_values=model.init_cache(1, 10)).past_key_values
    second = model(ids[:, 4:], past_key_values=first).past_key_values
    assert second.crop(-4) is second
    assert second.length == 2
    for call in (
        lambda cache: model(ids[:, :1], past_key_values=cache),
        lambda cache: model.generate(ids.repeat(2, 1), past_key_values=cache, max_new_tokens=1),
        lambda cache: cache.crop(1),
    ):
        with pytest.raises(InputError, match="past_key_values is used up: crop or select"):
            call(first)
    model(ids[:, 2:], past_key_values=second)


@pytest.mark.parametrize("grows", [True, False], ids=["grows", "fixed"])
def test_methods_of_transformers_change_a_cache_in_place(folder, grows):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 7)

    def read(rows, count):
        cache = None if grows else model.init_cache(rows.shape[0], 10)
        return model(rows[:, :count], past_key_values=cache, use_cache=True).past_key_values

    def follows(cache, rows):
        """Whether the cache holds the beginnings of these rows."""
        used = cache.get_seq_length()
        found = model(rows[:, used:], past_key_values=cache).logits
        np.testing.assert_allclose(found, model(rows).logits[:, used:], rtol=0, atol=2e-5)

    with torch.no_grad():
        cache = read(ids, 5)
        assert cache.reorder_cache(torch.tensor([1, 0])) is None
        follows(cache, ids[[1, 0]])
        cache = read(ids, 5)
        assert cache.batch_repeat_interleave(2) is None
        follows(cache, ids.repeat(2, 0))
        cache = read(ids, 5)
        assert cache.batch_select_indices(torch.tensor([1])) is None
        follows(cache, ids[1:])
        cache = read(ids, 5)
        cache.crop(-2)
        assert cache.seen_tokens == cache.get_usable_length(1) == 3
        follows(cache, ids)
        cache = read(ids, 5)
        cache.reset()
        assert cache.get_seq_length() == 0
        follows(cache, ids)
        empty = type(cache).from_legacy_cache()
        empty.reorder_cache([0])
        follows(empty, ids)
        follows(type(cache).from_legacy_cache(read(ids, 5).to_legacy_cache()), ids)
    assert read(ids, 5).get_max_length() == (None if grows else 10)
