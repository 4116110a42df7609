"""Sampling: the filtered distributions are the oracle's, and draws follow them."""

import importlib

import numpy as np
import pytest

from opt_core.generation.filters import candidates
from tests.support import oracle, oracle_generation
from tests.support.configs import CONFIGS
from tests.support.oracle_generation import Settings
from tests.support.reference import make_prompts
from tests.support.rules import backend_rules

pytestmark = pytest.mark.dealt

CLOSE = 1e-5
"""Of probabilities computed in float32."""
DRAWS = 20_000
CHANCE = 4.5
"""Standard deviations a frequency may be off; 1 in 150,000 by chance, and the seeds are fixed."""

WARPERS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.8},
    "top_p_low": {"top_p": 0.05},
    "min_p": {"min_p": 0.1},
    "typical": {"typical_p": 0.7},
    "typical_low": {"typical_p": 0.1},
    "top_h": {"top_h": 0.4},
    "epsilon": {"epsilon_cutoff": 0.02},
    "eta": {"eta_cutoff": 0.05},
    "all": {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "typical_p": 0.9},
}


@pytest.mark.parametrize("name", WARPERS)
def test_filtered_distributions_equal_the_oracle(backend, name):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, [[0.5], [2.0], [6.0]], (3, 99)).astype(np.float32)
    settings = {"top_k": 0, **WARPERS[name]}
    sampling = importlib.import_module(f"opt_{backend.name}.generation.sampling")
    rules = backend_rules(backend, 99, do_sample=True, **settings)
    values, ids = candidates(sampling, backend.array(logits), rules)
    values, ids = backend.numpy(values).astype(np.float64), backend.numpy(ids)
    for row in range(3):
        ours = np.zeros(99)
        ours[ids[row]] = np.exp(oracle.log_softmax(values[row]))
        theirs = oracle_generation.filtered_distribution(logits[row], [2], Settings(**settings))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE)
        np.testing.assert_array_equal(ours > 0, theirs > 0)


def test_a_top_k_beyond_the_vocabulary_keeps_everything(backend):
    sampling = importlib.import_module(f"opt_{backend.name}.generation.sampling")
    logits = backend.array(np.zeros((1, 9), np.float32))
    for k in (9, 1000, 0, None):
        rules = backend_rules(backend, 9, do_sample=True, top_k=k)
        values, _ = candidates(sampling, logits, rules)
        assert np.isfinite(backend.numpy(values)).sum() == 9


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 0},
        {"top_k": 0, "temperature": 2.5},
        {"temperature": 2.0, "top_k": 12, "repetition_penalty": 1.5},
        {"temperature": 2.0, "top_k": 0, "top_p": 0.7, "suppress_tokens": [10, 20, 30]},
        {"temperature": 3.0, "top_k": 0, "typical_p": 0.6},
    ],
    ids=str,
)
def test_frequencies_follow_the_distribution(backend, load, settings):
    config = CONFIGS["pre_ln"]
    ids = make_prompts(config, 1, 5, seed=3)
    out = backend.generate(
        load("pre_ln"), ids, do_sample=True, seed=11, max_new_tokens=1,
        num_return_sequences=DRAWS, eos_token_id=None, **settings,
    )  # fmt: skip
    counts = np.bincount(out[:, -1], minlength=99)
    logits = oracle.forward(oracle.random_params(config), config, ids).logits[0, -1]
    p = oracle_generation.filtered_distribution(logits, ids[0], Settings(**settings))
    assert (counts[p == 0] == 0).all()
    expected, deviation = DRAWS * p, np.sqrt(DRAWS * p * (1 - p))
    # Rare tokens are no normal variables; together they are checked by what is left for the others.
    often = expected > 10
    assert often.sum() > 3
    assert (np.abs(counts - expected)[often] < CHANCE * deviation[often] + 1).all()


@pytest.mark.xla
def test_rows_are_drawn_independently(backend, load):
    ids = make_prompts(CONFIGS["pre_ln"], 1, 5)
    out = backend.generate(
        load("pre_ln"), ids, do_sample=True, temperature=5.0, top_k=0,
        max_new_tokens=8, num_return_sequences=50, eos_token_id=None,
    )  # fmt: skip
    assert len({tuple(row) for row in out.tolist()}) == 50
    assert len({tuple(column) for column in out[:, 5:].T.tolist()}) == 8
