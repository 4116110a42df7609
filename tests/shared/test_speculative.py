"""Speculative decoding: the same greedy texts and the same distributions as without."""

import importlib

import numpy as np
import pytest

from opt_core.errors import GenerationError
from opt_core.generation.speculation import Rows, Slots
from tests.support import oracle, oracle_generation
from tests.support.configs import CONFIGS
from tests.support.oracle_generation import Settings
from tests.support.reference import make_mask, make_prompts
from tests.support.rules import backend_rules

pytestmark = pytest.mark.dealt

PAD = 1
PRE_LN = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
"""One layer: drafts are about tokens, and slots are the same in all layers."""
PLAIN = {"eos_token_id": None, "max_new_tokens": 24}
CHANCE = 4.5
"""Standard deviations a frequency may be off; 1 in 150,000 by chance, and the seeds are fixed."""


@pytest.fixture
def passes(monkeypatch) -> list[list[int]]:
    """How many tokens each row got, for the prompt and for every pass after it."""
    taken, take = [], Rows.take

    def watched(self, tokens, counts):
        taken.append(take(self, tokens, counts).tolist())
        return np.array(taken[-1], np.int32)

    monkeypatch.setattr(Rows, "take", watched)
    return taken


def same(backend, model, ids, drafts, **settings):
    """Generates with and without drafts, and expects the same ids."""
    plain = backend.generate(model, ids, **settings)
    ours = backend.generate(model, ids, **settings, **drafts)
    np.testing.assert_array_equal(ours, plain)
    return plain


FILTERS = {
    "repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "bad_words_ids": [[7], [8, 9]],
    "suppress_tokens": [5], "begin_suppress_tokens": list(range(3, 50)), "min_new_tokens": 9,
    "min_length": 16, "eos_token_id": list(range(60, 80)), "max_new_tokens": 30,
}  # fmt: skip


def test_greedy_texts_stay_the_same(backend, load, passes):
    """Rows of different lengths, drafts of every quality, everything that filters tokens."""
    model, ids = load(PRE_LN), make_prompts(PRE_LN, 3, 9)
    settings = {"attention_mask": make_mask("left", [9, 4, 1]), **FILTERS}
    near = load(PRE_LN, dtype="bfloat16")
    same(backend, model, ids, {"assistant_model": near, "num_assistant_tokens": 3}, **settings)
    gained = np.array(passes[1:])
    assert gained.max() == 4, "no draft was right: this test proves nothing"
    assert (gained.max(1) > gained.min(1)).any(), "rows went the same way"
    same(backend, model, ids, {"prompt_lookup_num_tokens": 3}, **settings)


def test_repeated_text_takes_few_passes(backend, load, passes):
    """A window filled to its last place by a text that is stuck; the last run is cut short."""
    config = CONFIGS["post_ln"].replace(max_position_embeddings=128)
    model, ids = load(config), make_prompts(config, 1, 96)
    settings = {"eos_token_id": None, "max_new_tokens": 33, "suppress_tokens": range(8, 99)}
    same(backend, model, ids, {"prompt_lookup_num_tokens": 7}, **settings)
    assert sum(n for (n,) in passes) == 33
    assert len(passes) < 22
    assert max(n for (n,) in passes) == 8


def test_a_draft_that_is_the_model_is_always_right(backend, load, passes):
    model, ids = load(PRE_LN), make_prompts(PRE_LN, 1, 1)
    drafts = {"assistant_model": model, "num_assistant_tokens": 4}
    same(backend, model, ids, drafts, **PLAIN)
    assert passes == [[1], [5], [5], [5], [5], [3]]


def test_gaps_can_be_closed_at_any_time(backend, load, monkeypatch):
    packed, pack = [], Slots.pack
    monkeypatch.setattr(Slots, "has_room", lambda self, count: False)
    monkeypatch.setattr(Slots, "pack", lambda self: packed.append(1) or pack(self))
    model, ids = load(PRE_LN), make_prompts(PRE_LN, 3, 9)
    drafts = {"assistant_model": load(PRE_LN, dtype="bfloat16")}
    drafts["num_assistant_tokens"] = 3
    same(
        backend, model, ids, drafts, **{**PLAIN, "eos_token_id": [15, 32, 49, 59]},
        attention_mask=make_mask("left", [9, 4, 1]),
    )  # fmt: skip
    assert len(packed) > 4


def test_stream_equals_generate(backend, load):
    model, ids = load(PRE_LN), make_prompts(PRE_LN, 2, 5)
    settings = {
        **PLAIN, "do_sample": True, "seed": 5, "num_return_sequences": 2, "temperature": 0.5,
        "eos_token_id": list(range(50, 60)), "prompt_lookup_num_tokens": 3,
    }  # fmt: skip
    tokens = [backend.numpy(t) for t in model.stream(ids, **settings)]
    whole = backend.generate(model, ids, **settings)
    np.testing.assert_array_equal(np.stack(tokens, 1), whole[:, 5:])
    other = backend.generate(model, ids, **{**settings, "seed": 6})
    assert other.shape != whole.shape or (other != whole).any()


def test_stop_strings_end_rows_inside_a_run(backend, texts):
    path, tokenizer = texts
    model = backend.load(path)
    prompts = tokenizer(["Now is", "this sun", "York"], padding_side="left")
    settings = {
        "attention_mask": prompts.attention_mask, "max_new_tokens": 40, "eos_token_id": None,
        "tokenizer": tokenizer,
    }  # fmt: skip
    width = prompts.input_ids.shape[1]
    drafts = {"assistant_model": model, "num_assistant_tokens": 7}
    free = backend.generate(model, prompts.input_ids, **settings)
    stop = tokenizer.decode(free[0, width + 4 : width + 6], True)
    settings["stop_strings"] = [stop, "never written"]
    same(backend, model, prompts.input_ids, drafts, **settings)


V, DRAWS = 7, 40_000


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
@pytest.mark.parametrize("is_drafted", [True, False])
def test_accepted_tokens_follow_the_models_distribution(backend, settings, is_drafted):
    """Of many rows alike: the first tokens, and the second ones given the first."""
    speculative = importlib.import_module(f"opt_{backend.name}.generation.speculative")
    rng = np.random.default_rng(0)
    rules = backend_rules(backend, V, do_sample=True, top_k=0, **settings)
    scores = rng.normal(0, 1.5, (3, V)).astype(np.float32)
    q = rng.dirichlet(np.ones(V), 2)
    drafts = np.stack([rng.choice(V, DRAWS, p=p) for p in q], 1)
    tokens, counts = speculative.accept_draft(
        backend.array(np.broadcast_to(scores, (DRAWS, 3, V)).copy()),
        backend.array(drafts if is_drafted else drafts[:1].repeat(DRAWS, 0)),
        backend.array(np.full(DRAWS, 2)),
        backend.array(np.broadcast_to(q.astype(np.float32), (DRAWS, 2, V)).copy())
        if is_drafted
        else None,
        rules,
        backend.random(3),
    )
    tokens, counts = backend.numpy(tokens), backend.numpy(counts)
    warped = Settings(**settings)
    for place in range(3):
        reached = tokens[counts > place, place]
        p = oracle_generation.filtered_distribution(scores[place], [0], warped)
        check_frequencies(np.bincount(reached, minlength=V), p)
    assert counts.min() == 1
    assert counts.max() == 3


def check_frequencies(counts, p):
    """Every token is about as frequent as it should be, and impossible ones never come."""
    total = counts.sum()
    deviation = np.sqrt(total * p * (1 - p))
    assert total > 2000
    assert (counts[p == 0] == 0).all()
    assert (np.abs(counts - total * p) < CHANCE * deviation + 1).all(), (counts, total * p)


@pytest.mark.parametrize("drafts", ["lookup", "assistant"])
def test_sampled_texts_follow_the_models_distribution(backend, load, drafts):
    """The third token, all ways to get there summed: it often comes in one run with the second."""
    words = [4, 5, 6, 7]
    others = [i for i in range(99) if i not in words]
    settings = {"top_k": 0, "temperature": 2.0, "suppress_tokens": others}
    model, ids = load(PRE_LN), np.array([[2, 4, 5, 6, 7, 4]])
    given = {"prompt_lookup_num_tokens": 2}
    if drafts == "assistant":
        given = {"assistant_model": load(PRE_LN, seed=1)}
        given["num_assistant_tokens"] = 2
    out = backend.generate(
        model, ids, do_sample=True, seed=1, max_new_tokens=3, num_return_sequences=4000,
        eos_token_id=None, **settings, **given,
    )[:, 6:]  # fmt: skip
    params, expected = oracle.random_params(PRE_LN), np.zeros(99)
    firsts = [[*ids[0], a, b] for a in words for b in words]
    logits = oracle.forward(params, PRE_LN, np.array(firsts)).logits[:, 5:]
    warped = Settings(**settings)
    for row, text in zip(logits, firsts, strict=True):
        first, second, third = (
            oracle_generation.filtered_distribution(x, text[: 6 + i], warped)
            for i, x in enumerate(row)
        )
        expected += first[text[6]] * second[text[7]] * third
    check_frequencies(np.bincount(out[:, 2], minlength=99), expected)


BAD = {
    "beams": ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "num_beams > 1 with prompt_lookup"),
    "none": ({"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens: expected an integer >= 1"),
    "n-gram": ({"max_matching_ngram_size": 0}, "max_matching_ngram_size: expected"),
    "count": ({"num_assistant_tokens": 0}, "num_assistant_tokens: expected an integer >= 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_settings_raise_one_clear_line(load, case):
    settings, message = BAD[case]
    with pytest.raises(GenerationError, match=message):
        load(PRE_LN).generate([[2, 5]], max_new_tokens=2, **settings)


def test_assistants_that_cannot_help(backend, folder, load):
    model, call = load(PRE_LN), {"max_new_tokens": 2}
    other = backend.load(folder(PRE_LN.replace(vocab_size=98)))
    short = backend.load(folder(PRE_LN.replace(max_position_embeddings=64)))
    for assistant, extra, message in (
        (other, {}, "assistant_model: expected the model's vocab_size=99, received 98"),
        (short, {}, "at least the model's max_position_embeddings=512, received 64"),
        ("opt-125m", {}, "assistant_model: expected an .*OPTForCausalLM, received str"),
        (load(PRE_LN, "none"), {}, "expected an .*OPTForCausalLM, received"),
        (model, {"num_beams": 2}, "num_beams > 1 with assistant_model is not supported"),
        (model, {"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens both draft; choose one"),
    ):
        for kind in ("generate", "stream"):
            with pytest.raises(GenerationError, match=message) as error:
                getattr(model, kind)([[2, 5]], assistant_model=assistant, **call, **extra)
            assert "\n" not in str(error.value)


def test_a_row_without_a_possible_token_is_an_error(load):
    with pytest.raises(GenerationError, match="row 0: no token can be generated: every token"):
        load(PRE_LN).generate(
            [[2, 5]], max_new_tokens=2, suppress_tokens=range(99), prompt_lookup_num_tokens=2
        )
