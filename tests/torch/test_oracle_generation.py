"""The oracle's generation against `transformers` 5, against brute force, and by hand."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.support import oracle
from tests.support.configs import CONFIGS
from tests.support.oracle import random_params
from tests.support.oracle_generation import (
    Settings,
    beam_search,
    exhaustive_search,
    filtered_distribution,
    greedy,
    pad_rows,
)
from tests.support.reference import make_mask, make_prompts, options, reference, tensors
from tests.support.tiers import tiered


def test_filters_by_hand():
    logits, p = np.log([0.5, 0.3, 0.15, 0.05]), np.array([0.5, 0.3, 0.15, 0.05])

    def kept(settings: Settings, history: tuple[int, ...] = ()) -> list[int]:
        return np.flatnonzero(filtered_distribution(logits, history, settings)).tolist()

    assert kept(Settings()) == [0, 1, 2, 3]
    assert kept(Settings(top_k=2)) == kept(Settings(top_p=0.7)) == [0, 1]
    assert kept(Settings(top_p=0.81)) == [0, 1, 2]
    assert kept(Settings(top_p=0.0)) == [0]
    assert kept(Settings(min_p=0.2)) == [0, 1, 2]
    assert kept(Settings(typical_p=0.2)) == [1]  # -log 0.3 = 1.20 is next to the entropy, 1.14
    assert kept(Settings(no_repeat_ngram_size=2), (0, 1, 0, 2, 0)) == [0, 3]
    assert kept(Settings(bad_words_ids=[[3], [0, 2, 1], [2, 2]]), (0, 2)) == [0]
    np.testing.assert_allclose(
        filtered_distribution(logits, (), Settings(temperature=0.5)), p**2 / (p**2).sum()
    )
    penalised = np.exp(np.array([1.0, -4.0, 1.0]))
    np.testing.assert_allclose(
        filtered_distribution([2.0, -2.0, 1.0], (0, 0, 1), Settings(repetition_penalty=2.0)),
        penalised / penalised.sum(),
    )


FILTERS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.6},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "no_repeat_1": {"no_repeat_ngram_size": 1},
    "no_repeat_2": {"no_repeat_ngram_size": 2},
    "no_repeat_3": {"no_repeat_ngram_size": 3},
    "bad_words": {"bad_words_ids": [[4], [2], [5, 6], [2, 7, 8], [3] * 40]},
    "suppress": {"suppress_tokens": [3, 9, 10]},
    "begin_suppress": {"begin_suppress_tokens": [2, 5, 6, 7]},
    "min_new_tokens": {"min_new_tokens": 3},
    "everything": {
        "temperature": 1.4,
        "top_k": 10,
        "top_p": 0.9,
        "min_p": 0.03,
        "typical_p": 0.9,
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[4], [5, 6]],
        "suppress_tokens": [3],
        "begin_suppress_tokens": [7],
        "min_new_tokens": 2,
    },
}
SMALL = CONFIGS["pre_ln"].replace(vocab_size=29, num_hidden_layers=2)


@pytest.mark.hf
@pytest.mark.parametrize("name", FILTERS)
def test_sampling_distributions_equal_transformers(name):
    torch = pytest.importorskip("torch")
    # transformers lets an n-gram of padding ban a token; here no padding token is ever generated.
    plain = Settings(suppress_tokens=[1])
    changes = {"eos_token_ids": [2, 5], **FILTERS[name]}
    changes["suppress_tokens"] = [1, *changes.get("suppress_tokens", ())]
    settings = dataclasses.replace(plain, **changes)
    ids, mask = make_prompts(SMALL, 6, 8), make_mask("left", [8, 7, 6, 5, 3, 1])
    ids[0], ids[mask == 0] = [2, 6, 7, 2, 6, 7, 2, 6], 1
    torch.manual_seed(0)
    arrays = tensors({"input_ids": ids, "attention_mask": mask})
    theirs = reference(SMALL).generate(
        **arrays,
        **options(settings),
        do_sample=True,
        max_new_tokens=12,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
    )
    at_work = False
    for row, (start, length) in enumerate(zip(8 - mask.sum(1), mask.sum(1), strict=True)):
        for step, (logits, scores) in enumerate(zip(theirs.logits, theirs.scores, strict=True)):
            history = theirs.sequences[row, start : 8 + step].tolist()
            if set(history[length:]) & {2, 5}:
                break
            ours = filtered_distribution(logits[row].numpy(), history, settings, int(length))
            expected = scores[row].double().softmax(-1).numpy()
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6)
            unfiltered = filtered_distribution(logits[row].numpy(), history, plain)
            at_work |= bool(np.abs(ours - unfiltered).max() > 1e-4)
    assert at_work, "the filter was never at work"


@pytest.mark.hf
def test_min_length_equals_transformers():
    settings = Settings(eos_token_ids=range(3, 29), min_length=9, suppress_tokens=[0, 1])
    ids = make_prompts(SMALL, 1, 5)
    theirs = reference(SMALL).generate(
        **tensors({"input_ids": ids}), **options(settings), do_sample=False, max_new_tokens=12
    )
    ours = greedy(random_params(SMALL), SMALL, ids, max_new_tokens=12, settings=settings)
    assert ours.tolist() == theirs.tolist()
    assert ours.shape == (1, 10)


REPETITION = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
GREEDY = [
    {},
    {"eos_token_ids": [2]},
    {"eos_token_ids": [2, *range(50, 60)]},
    {"eos_token_ids": range(50, 80), "min_new_tokens": 6},
    REPETITION,
    {"suppress_tokens": range(40), "begin_suppress_tokens": range(90)},
]


@pytest.mark.hf
@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_equals_transformers(name):
    config = CONFIGS[name]
    model, params = reference(config), random_params(config)
    ids, mask = make_prompts(config, 4, 8), make_mask("left", [8, 6, 3, 1])
    ids[mask == 0] = 1
    for choices in GREEDY:
        settings = Settings(**choices)
        arrays = tensors({"input_ids": ids, "attention_mask": mask})
        theirs = model.generate(**arrays, **options(settings), do_sample=False, max_new_tokens=20)
        ours = greedy(params, config, ids, mask, max_new_tokens=20, settings=settings)
        assert ours.tolist() == theirs.tolist(), choices


BEAMS = list(
    itertools.product(
        (2, 3, 5),  # num_beams
        (0.5, 1.0, 2.0, -1.0, 0.0),  # length_penalty
        ((2,), (3, 7, 11), range(3, 9)),  # eos_token_ids
    )
)


@pytest.mark.hf
@pytest.mark.parametrize(
    ("name", "every"),
    tiered([("post_ln", 2), *((name, 1) for name in CONFIGS)], lambda name, every: every > 1),
)
def test_beam_search_equals_transformers(name, every):
    config = CONFIGS[name].replace(vocab_size=13, num_hidden_layers=1)
    model, params = reference(config), random_params(config)
    outcomes = {early_stopping: [] for early_stopping in (False, True, "never")}
    for number, (num_beams, length_penalty, eos) in [*enumerate(BEAMS)][::every]:
        filters = REPETITION if number % 4 == 0 else {}
        settings = Settings(eos_token_ids=eos, **filters)
        prompt = make_prompts(config, 1, 1 + number % 5, seed=number)[0].tolist()
        rules = {"num_beams": num_beams, "length_penalty": length_penalty}
        rules["max_new_tokens"] = 6 + number % 7
        for early_stopping, found in outcomes.items():
            rules["early_stopping"] = early_stopping
            returned = 1 if number % 9 == 0 else num_beams
            theirs = model.generate(
                **tensors({"input_ids": [prompt], "attention_mask": [[1] * len(prompt)]}),
                **options(settings),
                **rules,
                do_sample=False,
                num_return_sequences=returned,
                return_dict_in_generate=True,
                output_scores=True,
            )
            ours = beam_search(params, config, prompt, **rules, settings=settings)[:returned]
            assert pad_rows(prompt, ours, 1).tolist() == theirs.sequences.tolist(), rules
            scores = [hypothesis.score for hypothesis in ours]
            np.testing.assert_allclose(scores, theirs.sequences_scores.numpy(), atol=1e-5)
            found.append([hypothesis.tokens for hypothesis in ours])
    assert outcomes[False] != outcomes[True] != outcomes["never"] != outcomes[False]


@pytest.mark.parametrize(
    ("name", "length_penalty"),
    tiered(
        itertools.product(CONFIGS, [0.0, 1.0, 2.0]),
        lambda name, length_penalty: length_penalty == 1.0 or name == "post_ln",
    ),
)
def test_the_widest_beam_finds_everything(name, length_penalty):
    config = CONFIGS[name].replace(vocab_size=5)
    params, settings = random_params(config), Settings(eos_token_ids=[3])
    search = {"max_new_tokens": 4, "length_penalty": length_penalty, "settings": settings}
    everything = exhaustive_search(params, config, [2, 4], **search)
    assert len(everything) == 1 + 4 + 16 + 64 * 5
    assert {h.tokens for h in everything if 3 in h.tokens[:-1]} == set()
    for hypothesis in everything[::50]:
        log_p = oracle.sequence_log_probability(params, config, [2, 4, *hypothesis.tokens], 2)
        assert hypothesis.score * len(hypothesis.tokens) ** length_penalty == pytest.approx(log_p)
    mass = sum(np.exp(h.score * len(h.tokens) ** length_penalty) for h in everything)
    assert mass == pytest.approx(1.0)

    found = beam_search(params, config, [2, 4], num_beams=400, **search)
    assert [h.tokens for h in found] == [h.tokens for h in everything]
    narrow = beam_search(params, config, [2, 4], num_beams=2, **search)
    assert narrow[0].score <= everything[0].score + 1e-12
