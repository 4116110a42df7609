"""Prompts read in pieces, prompts that others have read already, and caches that go back."""

import importlib
from functools import wraps

import numpy as np
import pytest

from opt_core.errors import InputError
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered

pytestmark = pytest.mark.dealt

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
"""One layer: what is read once, is read once in all of them."""
PLAIN = {"eos_token_id": None, "max_new_tokens": 12}
SAME = 2e-5
DECODERS = {
    "torch": ("OPTDecoder", "forward"),
    "tf": ("TFOPTDecoder", "call"),
    "flax": ("FlaxOPTDecoder", "__call__"),
}


@pytest.fixture
def widths(backend, monkeypatch) -> list[int]:
    """How many tokens the decoder was given, call by call (in compiled programs: as traced)."""
    name, method = DECODERS[backend.name]
    decoder = getattr(importlib.import_module(f"opt_{backend.name}.decoder"), name)
    seen, run = [], getattr(decoder, method)

    @wraps(run)  # Keras reads the signature
    def watched(self, embeds, *args, **kwargs):
        seen.append(int(embeds.shape[1]))
        return run(self, embeds, *args, **kwargs)

    monkeypatch.setattr(decoder, method, watched)
    return seen


def read(model, ids, slots, **inputs):
    """A cache that holds some prompts."""
    cache = model.init_cache(len(ids), slots)
    return model(ids, past_key_values=cache, **inputs).past_key_values


MODES = {
    "greedy": {"repetition_penalty": 1.2},
    "sampled": {"do_sample": True, "num_return_sequences": 2, "seed": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
}
ROWS = {mode: 2 + i for i, mode in enumerate(MODES)}
"""Prompts of each: another number of them has a program of its own, whose tracing is watched."""


@pytest.mark.parametrize("mode", tiered(MODES, lambda mode: mode in ("greedy", "beams")))
def test_prompts_read_in_chunks(backend, load, widths, mode):
    model, ids = load(CONFIG), make_prompts(CONFIG, ROWS[mode], 40)
    mask = make_mask("left", [40, 23, 40, 31, 40][: ROWS[mode]])
    settings = {**PLAIN, **MODES[mode], "attention_mask": mask}
    whole = backend.generate(model, ids, **settings)
    assert max(widths) >= 40
    for chunk in (16, 39) if backend.name == "torch" else (16,):
        del widths[:]
        np.testing.assert_array_equal(
            backend.generate(model, ids, prefill_chunk_size=chunk, **settings), whole
        )
        assert max(widths) == chunk
    np.testing.assert_array_equal(
        backend.generate(model, ids, prefill_chunk_size=100, **settings), whole
    )


@pytest.mark.parametrize("mode", tiered(MODES, lambda mode: mode == "sampled"))
def test_a_shared_prefix_is_read_once(backend, load, widths, mode):
    """A prompt's cache serves any number of endings, of different lengths, again and again."""
    model, ids = load(CONFIG), make_prompts(CONFIG, ROWS[mode], 60)
    ids[:, :50] = ids[0, :50]
    lengths = [10, 4, 1, 7, 10][: ROWS[mode]]
    mask = np.concatenate([np.ones((len(ids), 50), int), make_mask("left", lengths)], 1)
    cache = read(model, ids[:1, :50], 50)
    settings = {**PLAIN, **MODES[mode], "attention_mask": mask}
    whole = backend.generate(model, ids, **settings)
    assert max(widths) >= 60
    for chunk in (None, 4):
        del widths[:]
        shared = backend.generate(
            model, ids, past_key_values=cache, prefill_chunk_size=chunk, **settings
        )
        np.testing.assert_array_equal(shared, whole)
        assert max(widths) <= 32


def test_prefixes_may_be_padded_and_of_one_row_each(backend, load):
    model, ids = load("post_ln"), make_prompts(CONFIGS["post_ln"], 3, 20)
    mask = make_mask("left", [20, 13, 8])
    cache = read(model, ids[:, :15], 70, attention_mask=mask[:, :15])
    whole = backend.generate(model, ids, attention_mask=mask, **PLAIN)
    for _ in range(2):
        shared = backend.generate(model, ids, attention_mask=mask, past_key_values=cache, **PLAIN)
        np.testing.assert_array_equal(shared, whole)
    tokens = model.stream(ids, attention_mask=mask, past_key_values=cache, **PLAIN)
    np.testing.assert_array_equal(np.stack([backend.numpy(t) for t in tokens], 1), whole[:, 20:])


def test_prefixes_that_do_not_fit(backend, folder, load):
    model, ids = load(CONFIG), make_prompts(CONFIG, 3, 8)
    padded = make_mask("left", [8, 8, 7])
    two = read(model, ids[:2, :5], 9)
    deep = backend.load(folder(CONFIG.replace(num_hidden_layers=3)))
    for cache, mask, message in (
        ("cache", None, "past_key_values: expected a cache of this model, received str"),
        (two, None, "past_key_values holds 2 rows, the input has 3"),
        (read(model, ids, 9), None, "holds 8 tokens: expected input_ids that begin with them and"),
        (read(deep, ids[:, :5], 9), None, "past_key_values is of another model"),
        (read(model, ids[:, :5], 9), padded, "disagree about where padding is"),
    ):
        with pytest.raises(InputError, match=message):
            model.generate(ids, mask, past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize("mask", [None, make_mask("left", [9, 5])], ids=["bare", "left"])
def test_a_cache_goes_back(backend, load, mask):
    """Another ending after the same prefix: as if the first had never been."""
    model, ids = load(CONFIG), make_prompts(CONFIG, 2, 9)
    other = make_prompts(CONFIG, 2, 9, seed=1)
    masks = {} if mask is None else {"attention_mask": mask[:, :4]}
    cache = read(model, ids[:, :4], 12, **masks)
    blank = {"attention_mask": np.zeros((2, 3), int)}  # padding that must be forgotten too
    cache = model(ids[:, 4:7], past_key_values=cache, **blank).past_key_values
    cache = model(ids[:, 7:], past_key_values=cache).past_key_values
    cache = cache.crop(4)
    assert int(cache.length) == 4
    out = backend.run(model, input_ids=other[:, 4:], past_key_values=cache)
    whole = np.concatenate([ids[:, :4], other[:, 4:]], 1)
    expected = backend.run(model, input_ids=whole, attention_mask=mask).logits[:, 4:]
    np.testing.assert_allclose(out.logits, expected, rtol=0, atol=SAME)
    with pytest.raises(InputError, match=r"crop: expected a length in 0\.\.9, received 10"):
        out.past_key_values.crop(10)
    assert int(out.past_key_values.crop(-2).length) == 7
