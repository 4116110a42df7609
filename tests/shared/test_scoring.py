"""Scores for evaluation against the oracle, and how many programs they take."""

import importlib
from typing import Any

import numpy as np
import pytest

from opt_core.errors import InputError
from tests.support import oracle
from tests.support.backends import BACKENDS, ORACLE_TOLERANCE, Backend
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts

pytestmark = pytest.mark.dealt

TINY = {name: config.replace(num_labels=3) for name, config in CONFIGS.items()}


def scoring(backend: Backend) -> Any:
    return importlib.import_module(f"opt_{backend.name}.scoring")


def expected(config: Any, ids: Any, mask: Any = None) -> tuple[Any, Any]:
    """The oracle's log-likelihoods of the next tokens, and whether each is the likeliest."""
    logits = oracle.forward(oracle.random_params(config), config, ids, mask).logits[:, :-1]
    picked = np.take_along_axis(oracle.log_softmax(logits), ids[:, 1:, None], -1)[..., 0]
    return picked, logits.argmax(-1) == ids[:, 1:]


def close(ours: Any, theirs: Any) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=ORACLE_TOLERANCE)


@pytest.mark.parametrize("name", ["pre_ln", "post_ln"])
def test_token_scores_equal_the_oracle(backend: Backend, load: Any, name: str):
    config, module = TINY[name], scoring(backend)
    model = load(config)
    ids = make_prompts(config, 3, 37)
    ids[0, 20:] = backend.generate(model, ids[:1, :20], max_new_tokens=17, eos_token_id=())[0, 20:]
    scores, likeliest = module.token_scores(model, ids)
    theirs, are_best = expected(config, ids)
    close(scores, theirs)
    assert np.array_equal(likeliest, are_best)
    assert likeliest[0, 19:].all()
    assert not likeliest[1:].all()
    assert np.array_equal(module.token_log_likelihoods(model, ids), scores)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_scores_nothing_and_changes_nothing(backend: Backend, load: Any, side: str):
    config, module = TINY["pre_ln"], scoring(backend)
    model = load(config)
    ids, mask = make_prompts(config, 3, 9), make_mask(side, [9, 5, 2])
    ids[mask == 0] = config.pad_token_id or 0
    scores, likeliest = module.token_scores(model, ids, mask)
    kept = (mask[:, 1:] & mask[:, :-1]).astype(bool)
    close(scores[kept], expected(config, ids, mask)[0][kept])
    assert not scores[~kept].any()
    assert likeliest[~kept].all()
    if side == "right":  # what the docstring says: on the right no mask is needed
        close(module.token_log_likelihoods(model, ids)[kept], scores[kept])


def test_logits_of_few_tokens_are_held_at_a_time(
    backend: Backend, load: Any, monkeypatch: pytest.MonkeyPatch
):
    config, module = TINY["pre_ln"], scoring(backend)
    model = load(config)
    ids = make_prompts(config, 2, 33)
    whole = module.token_scores(model, ids)
    for limit in (5 * 2 * config.vocab_size, 1):
        monkeypatch.setattr(module, "LOGITS", limit)
        scores, likeliest = module.token_scores(model, ids)
        np.testing.assert_allclose(scores, whole[0], rtol=0, atol=1e-5)
        assert np.array_equal(likeliest, whole[1])


def test_other_heads_equal_the_oracle(backend: Backend, load: Any):
    config, module = TINY["post_ln"], scoring(backend)
    ids, mask = make_prompts(config, 3, 9), make_mask("right", [9, 5, 2])
    ids[mask == 0] = config.pad_token_id or 0
    head = "sequence_classification"
    params = oracle.random_params(config, head)
    logits = module.class_logits(load(config, head), ids, mask)
    close(logits, oracle.classify(params, config, ids, attention_mask=mask))
    head = "question_answering"
    params = oracle.random_params(config, head)
    model = load(config, head)
    for ours, theirs in zip(
        module.span_logits(model, ids, mask),
        oracle.answer_span(params, config, ids, attention_mask=mask),
        strict=True,
    ):
        assert ours.shape == theirs.shape
        close(ours[mask == 1], theirs[mask == 1])


def test_a_full_window_is_scored_and_a_longer_one_refused(backend: Backend, load: Any):
    config = TINY["pre_ln"].replace(max_position_embeddings=33)
    model = load(config)
    ids = make_prompts(config, 1, 34)
    close(
        scoring(backend).token_log_likelihoods(model, ids[:, :33]), expected(config, ids[:, :33])[0]
    )
    with pytest.raises(InputError, match="34 tokens exceeds max_position_embeddings=33"):
        scoring(backend).token_log_likelihoods(model, ids)
    with pytest.raises(InputError, match=r"expected values in 0\.\.98"):
        scoring(backend).token_log_likelihoods(model, ids[:, :5] + 200)


def test_rows_of_one_bucket_share_a_program(folder: Any, monkeypatch: pytest.MonkeyPatch):
    """Counted where programs are compiled: a row of 33 to 64 tokens needs no other one."""
    config, lengths = TINY["pre_ln"], (33, 47, 64)
    if "flax" in BACKENDS:
        from opt_flax import FlaxOPTForCausalLM, scoring

        program: Any = scoring._token_scores
        model = FlaxOPTForCausalLM.from_pretrained(folder(config))
        before = program._cache_size()
        for length in lengths:
            scoring.token_scores(model, make_prompts(config, 5, length))
        assert program._cache_size() == before + 1
    if "tf" in BACKENDS:
        from opt_tf import TFOPTForCausalLM, scoring

        model = TFOPTForCausalLM.from_pretrained(folder(config))
        for length in lengths:
            scoring.token_scores(model, make_prompts(config, 5, length))
        (program,) = model.programs.values()
        assert program.experimental_get_tracing_count() == 1
