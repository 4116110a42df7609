"""Calls as code for `transformers` makes them: outputs, the loop over a cache, all arguments."""

import pickle

import numpy as np
import pytest

from opt_core.errors import ArgumentError, InputError
from tests.support import oracle
from tests.support.backends import ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts

pytestmark = pytest.mark.dealt

CONFIG = CONFIGS["pre_ln"]
LENGTH, FIRST = 8, 6
"""Few lengths in all: JAX compiles each operation anew for each of them."""
IDS = make_prompts(CONFIG, 2, LENGTH)
LEFT = make_mask("left", [LENGTH, 5])


@pytest.fixture(scope="module")
def right():
    """Logits of the whole, by the oracle."""
    params = oracle.random_params(CONFIG)
    return {
        name: oracle.forward(params, CONFIG, IDS, attention_mask=mask).logits
        for name, mask in (("bare", None), ("left", LEFT))
    }


@pytest.fixture
def model(load):
    return load("pre_ln")


def close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ORACLE_TOLERANCE)


def loop(backend, model, cache=None, make_mask=None, **options):
    """Logits of all tokens, each call going on from what the last one returned."""
    logits, start, out = [], 0, None
    for end in range(FIRST, LENGTH + 1):
        if make_mask is not None:
            options["attention_mask"] = make_mask(end)
        out = backend.run(model, input_ids=IDS[:, start:end], past_key_values=cache, **options)
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    assert out is not None
    assert out.past_key_values.get_seq_length() == LENGTH
    return np.concatenate(logits, 1)


def test_the_first_call_gives_a_cache_that_grows(backend, model, right):
    """It holds the first call's keys and values; what follows finds room."""
    close(loop(backend, model), right["bare"])
    out = model(IDS)
    cache = out.past_key_values
    assert len(cache) == CONFIG.num_hidden_layers
    assert cache.get_max_cache_shape() == -1
    for keys, values in cache:
        assert tuple(keys.shape) == tuple(values.shape) == (2, 4, LENGTH, 8)
    assert model(IDS, use_cache=False).past_key_values is None


@pytest.mark.parametrize("width", [LENGTH, 20])
def test_masks_may_cover_what_came_before_or_all_slots(backend, model, right, width):
    """Those over all slots, as Flax has them, may say anything of slots that are not filled."""
    whole = np.pad(LEFT, ((0, 0), (0, width - LENGTH))).astype(np.float32)
    cache = None if width == LENGTH else model.init_cache(2, width)
    made = loop(backend, model, cache, lambda end: whole[:, :end] if width == LENGTH else whole)
    close(made[LEFT > 0], right["left"][LEFT > 0])


def test_legacy_caches_are_taken(backend, model, right):
    pairs = model(IDS[:, :FIRST]).past_key_values.to_legacy_cache()
    out = backend.run(model, input_ids=IDS[:, FIRST : FIRST + 1], past_key_values=pairs)
    close(out.logits, right["bare"][:, FIRST : FIRST + 1])
    for wrong, message in [
        ((1, 2), "expected a pair of keys and values"),
        (pairs[:1], "of another model"),
        ("cache", "expected a cache of this model, received str"),
    ]:
        with pytest.raises(InputError, match=f"past_key_values.*{message}"):
            model(IDS[:, FIRST:], past_key_values=wrong)


def test_rows_of_a_cache_that_grows_are_chosen(backend, model, right):
    cache = model(IDS[:, :FIRST]).past_key_values.select(backend.array(np.array([1, 0])))
    next_ids = IDS[::-1, FIRST : FIRST + 1].copy()
    out = backend.run(model, input_ids=next_ids, past_key_values=cache)
    close(out.logits, right["bare"][::-1, FIRST : FIRST + 1])
    if backend.name != "torch":  # whose caches are changed in place: tests/torch/test_cache.py
        with pytest.raises(InputError, match=r"use cache = cache\.select"):
            cache.reorder_cache([0, 1])


def test_outputs_are_tuples_where_that_is_asked_for(backend, model, right):
    loss, logits = model(IDS, labels=IDS)[:2]
    close(backend.numpy(logits), right["bare"])
    close(backend.numpy(loss), oracle.lm_loss(right["bare"], IDS))
    plain = model(IDS, labels=IDS, use_cache=False, return_dict=False)
    assert isinstance(plain, tuple)
    assert len(plain) == 2
    out = backend.call(model, input_ids=IDS, use_cache=False, output_attentions=True)
    assert list(out) == ["logits", "attentions"]
    again = pickle.loads(pickle.dumps(out))
    assert type(again) is type(out)
    close(backend.numpy(again[0]), backend.numpy(out["logits"]))


def test_heads_are_masked(backend, model):
    """A head whose weights are scaled is one whose columns of `out_proj` are."""
    mask = np.array([[0, 1, 2, 1], [1, 0.5, 1, 0]], np.float32)
    params = oracle.random_params(CONFIG)
    for layer, row in enumerate(mask):
        name = f"model.decoder.layers.{layer}.self_attn.out_proj.weight"
        params[name] = params[name] * np.repeat(row, CONFIG.head_dim)
    expected = oracle.forward(params, CONFIG, IDS)
    out = backend.run(model, input_ids=IDS, head_mask=mask, output_attentions=True)
    close(out.logits, expected.logits)
    close(out.attentions[0], expected.attentions[0] * mask[0][:, None, None])
    close(backend.run(model, input_ids=IDS, head_mask=mask).logits, expected.logits)


def test_other_arguments_have_their_effect_or_none(backend, model, right):
    kept = backend.run(model, input_ids=IDS, logits_to_keep=backend.array(np.array([0, 5]))).logits
    close(kept, right["bare"][:, [0, 5]])
    harmless = {"token_type_ids": np.zeros_like(IDS), "cache_position": np.arange(LENGTH)}
    ids = IDS.astype(np.float32)  # whole numbers are ids in any type
    close(backend.run(model, input_ids=ids, **harmless).logits, right["bare"])
    loss = backend.run(model, input_ids=IDS, labels=IDS, num_items_in_batch=28).loss
    close(loss, oracle.lm_loss(right["bare"], IDS) / 2)  # of 2 rows of 7
    with pytest.raises(ArgumentError, match="did you mean 'use_cache'"):
        model(IDS, use_cach=True)
    with pytest.raises(InputError, match=r"cache_position.*expected 0\.\.7"):
        model(IDS, cache_position=np.arange(1, LENGTH + 1))
