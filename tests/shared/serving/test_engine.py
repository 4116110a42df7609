"""Rows of one batch that come and go: each gets what `generate` gives it alone."""

import importlib
import random
from typing import Any

import numpy as np
import pytest

from opt_core.generation.mixin import make_request
from opt_core.serving import scheduler as scheduler_module
from opt_core.serving.engine import ALTERNATIVES
from opt_core.serving.row import Row
from opt_core.serving.scheduler import Scheduler
from tests.support import oracle
from tests.support.backends import BACKENDS, ORACLE_TOLERANCE
from tests.support.configs import CONFIGS

pytestmark = pytest.mark.dealt

CONFIG = CONFIGS["post_ln"].replace(max_position_embeddings=200, vocab_size=199)
"""Two widths of the cache; more ids than a program of few candidates has."""
SLOTS, CHUNK, PROGRAM_CHUNK = 3, 16, 8
RULES: dict[str, list[dict[str, Any]]] = {
    "greedy": [
        {},
        {"repetition_penalty": 1.3, "min_new_tokens": 4, "eos_token_id": list(range(60))},
        {"sequence_bias": {(12,): 2.0}, "suppress_tokens": [11]},
    ],
    "sampled": [
        {"do_sample": True, "temperature": 0.7, "top_k": 20, "eos_token_id": list(range(9))},
        {"do_sample": True, "top_k": 70, "min_p": 0.01, "begin_suppress_tokens": list(range(90))},
        {"do_sample": True, "top_k": 0, "top_p": 0.8, "temperature": 1.5},
    ],
}


@pytest.fixture(autouse=True)
def both_programs(monkeypatch):
    """Prompts here are short: programs of both sizes read them all the same."""
    monkeypatch.setattr(scheduler_module, "PROGRAM_CHUNK", PROGRAM_CHUNK)


def make_scheduler(backend, folder, config=CONFIG):
    model = backend.load(folder(config))
    engine = importlib.import_module(f"opt_{backend.name}.serving.engine").Engine(model, SLOTS)
    return model, Scheduler(engine, CHUNK)


def make_rows(model, count, rules) -> list[tuple[Row, dict[str, Any]]]:
    """Rows of which some begin alike, with settings in turn.

    Their lengths, prompts of 33 to 64 tokens and 65 to 128 in all, make one program of `generate`.
    """
    source, rows = random.Random(0), []
    beginning = [source.randrange(3, 199) for _ in range(32)]
    for i in range(count):
        ids = [source.randrange(3, 199) for _ in range((33, 47, 60)[i % 3])]
        ids = beginning + ids[-30:] if i % 4 == 0 else ids
        call = {"input_ids": [ids], "seed": 2**40 + i, "max_new_tokens": (40, 32)[i % 2]}
        call |= {"eos_token_id": None, **rules[i % len(rules)]}
        rows.append((Row(make_request(model, **call), is_scored=i % 2 == 0), call))
    return rows


def run(scheduler, rows, pause=0) -> None:
    for row in rows:
        scheduler.submit(row)
        for _ in range(pause):
            scheduler.step()
    while not scheduler.is_idle:
        scheduler.step()


@pytest.mark.parametrize("kind", RULES)
def test_rows_get_what_they_get_alone(backend, folder, kind):
    model, scheduler = make_scheduler(backend, folder)
    rows = make_rows(model, 9, RULES[kind])
    run(scheduler, [row for row, _ in rows], pause=9)
    for row, call in rows:
        alone = backend.generate(model, **call)[0, len(row.prompt) :]
        assert row.made == alone.tolist(), call
    ends = {row.ended for row, _ in rows}
    assert ends == {"stop", "length"}, "this test proves less than it should"


def test_scores_are_those_of_the_model(backend, folder):
    """By the oracle: of the prompt's tokens and the new ones; and the window is filled."""
    model, scheduler = make_scheduler(backend, folder)
    prompt = np.random.default_rng(0).integers(3, 199, 190).tolist()
    request = make_request(
        model, [prompt], max_new_tokens=11, do_sample=True, top_k=0, temperature=2.0, seed=1
    )
    row = Row(request, is_scored=True, scores_prompt=True)
    scores = []
    scheduler.submit(row)
    while not scheduler.is_idle:
        scores += [event.scores for event in scheduler.step()]
    params = oracle.random_params(CONFIG, "causal_lm", 0)
    logits = oracle.forward(params, CONFIG, np.array([row.prompt + row.made[:-1]])).logits[0]
    expected = logits - np.logaddexp.reduce(logits, 1, keepdims=True)
    every = [*row.prompt_scores, *scores]
    assert len(every) == len(expected)
    text = row.prompt + row.made
    for place, score in enumerate(every):
        best = expected[place].argsort()[::-1][:ALTERNATIVES]
        assert abs(score.logprob - expected[place, text[place + 1]]) < ORACLE_TOLERANCE
        np.testing.assert_allclose(score.logprobs, expected[place, best], atol=ORACLE_TOLERANCE)
        assert score.ids[0] == best[0]


@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name != "torch"], indirect=True
)  # PyTorch compiles nothing
def test_nothing_is_compiled_after_the_warm_up(backend, folder):
    model, scheduler = make_scheduler(backend, folder, CONFIG.replace(num_hidden_layers=1))
    scheduler.warm_up()
    before = programs(backend, model)
    assert sum(before.values()) >= 8
    run(
        scheduler,
        [row for row, _ in make_rows(model, 6, [*RULES["greedy"], *RULES["sampled"]])],
        pause=1,
    )
    scored = Row(make_request(model, [[5] * 150], max_new_tokens=2), scores_prompt=True)
    run(scheduler, [scored])
    assert scored.ended == "length"
    assert programs(backend, model) == before


def programs(backend, model) -> dict[str, int]:
    """How often each function was traced."""
    if backend.name == "flax":
        engine = importlib.import_module("opt_flax.serving.engine")
        names = ("_step", "_read", "_score", "_copy", "_resize", "_row", "_choose")
        return {name: getattr(engine, name)._cache_size() for name in names}
    return {
        str(key): program.experimental_get_tracing_count()
        for key, program in model.programs.items()
    }
