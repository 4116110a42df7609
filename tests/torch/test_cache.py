"""Key-value caches, whose buffers are shared with their successors."""

import pytest

pytest.importorskip("torch")


from opt_core.errors import InputError
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.torch_models import model_of


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
    back = second.crop(2)
    for cache in (first, second):
        for call in (
            lambda cache: model(ids[:, :1], past_key_values=cache),
            lambda cache: model.generate(ids.repeat(2, 1), past_key_values=cache, max_new_tokens=1),
            lambda cache: cache.crop(1),
        ):
            with pytest.raises(InputError, match="past_key_values is used up: crop or select"):
                call(cache)
    model(ids[:, 2:], past_key_values=back)
