"""Arguments of a model's call."""

import numpy as np
import pytest

from opt_core.compatibility import calls
from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError, InputError, OPTError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cach": True}, "no argument 'use_cach'; did you mean 'use_cache'"),
        ({"outptu_attentions": True}, "did you mean 'output_attentions'"),
        ({"wholly_other": None}, "no argument 'wholly_other'$"),
        ({"encoder_hidden_states": 1}, r"encoder_hidden_states: expected None \(OPT has no"),
        ({"decoder_head_mask": 1}, r"decoder_head_mask: expected None \(use head_mask\)"),
    ],
)
def test_an_argument_that_no_model_has_is_named(options, message):
    with pytest.raises(ArgumentError, match=message) as caught:
        calls.check_options(options)
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, OPTError)
    assert "\n" not in str(caught.value)


def test_harmless_arguments_are_accepted():
    calls.check_options({"token_type_ids": [[0, 1]], "encoder_hidden_states": None})


def test_new_tokens_follow_the_cache():
    calls.check_cache_position(np.array([4, 5]), 4, 2)
    with pytest.raises(InputError, match=r"expected 4\.\.5, received \[0, 1\]"):
        calls.check_cache_position(np.array([0, 1]), 4, 2)


def test_logits_are_kept_of_the_last_tokens_or_of_an_index():
    hidden = np.arange(6)
    for keep, expected in [
        (0, hidden), (2, [4, 5]), (np.array(2), [4, 5]), ([0, 3], [0, 3]), (np.array([1]), [1]),
    ]:  # fmt: skip
        np.testing.assert_array_equal(hidden[calls.kept_tokens(keep)], expected)


def test_each_layer_has_a_mask_of_its_heads():
    config = OPTConfig(hidden_size=6, num_attention_heads=3, num_hidden_layers=2)
    one, each = np.arange(3), np.arange(6).reshape(2, 3)
    assert [list(mask) for mask in calls.each_layers_heads(config, one)] == [[0, 1, 2]] * 2
    assert [list(mask) for mask in calls.each_layers_heads(config, each)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(InputError, match=r"head_mask: expected shape \(2, 3\) or \(3,\), received"):
        calls.each_layers_heads(config, np.ones((3, 2)))
