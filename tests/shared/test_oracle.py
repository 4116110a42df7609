"""The oracle against `transformers` 5, in float64: two implementations without a line in common."""

import numpy as np
import pytest

from tests.support import oracle, oracle_generation
from tests.support.configs import CONFIGS
from tests.support.oracle import forward, random_params
from tests.support.reference import make_mask, make_prompts, reference, tensors

PRE_LN = CONFIGS["pre_ln"]
MODELS = {
    **CONFIGS,
    "untied": PRE_LN.replace(tie_word_embeddings=False),
    "untied_post_ln": CONFIGS["post_ln"].replace(tie_word_embeddings=False),
    "no_final_norm": PRE_LN.replace(_remove_final_layer_norm=True),
}

INPUTS = {
    "bare": {},
    "left": {"attention_mask": make_mask("left", [9, 5, 1])},
    "right": {"attention_mask": make_mask("right", [9, 5, 1])},
    "positions": {"position_ids": np.random.default_rng(1).integers(0, 500, (3, 9))},
    "all": {
        "attention_mask": make_mask("left", [9, 5, 1]),
        "position_ids": np.random.default_rng(1).integers(-1, 500, (3, 9)),
    },
}


@pytest.mark.hf
@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_transformers(name):
    config = MODELS[name]
    ids, model, params = make_prompts(config, 3, 9), reference(config), random_params(config)
    for inputs in INPUTS.values():
        theirs = model(**tensors({"input_ids": ids, **inputs}), output_hidden_states=True)
        ours = forward(params, config, ids, **inputs)
        attended = inputs.get("attention_mask", np.ones_like(ids)) > 0
        np.testing.assert_allclose(
            ours.logits[attended], theirs.logits.numpy()[attended], rtol=0, atol=1e-11
        )
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            np.testing.assert_allclose(a[attended], b.numpy()[attended], rtol=0, atol=1e-11)


@pytest.mark.hf
@pytest.mark.parametrize("activation", oracle.ACTIVATIONS)
def test_activations_equal_transformers(activation):
    config = PRE_LN.replace(activation_function=activation, num_hidden_layers=1)
    ids = make_prompts(config, 2, 7)
    theirs = reference(config)(**tensors({"input_ids": ids})).logits.numpy()
    ours = forward(random_params(config), config, ids).logits
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.hf
def test_attentions_and_embeddings_equal_transformers():
    config = CONFIGS["post_ln"]
    # The eager softmax is in float32 whatever the model's type is.
    model, ids = reference(config, attention="eager"), make_prompts(config, 2, 7)
    params = random_params(config)
    embeds = params["model.decoder.embed_tokens.weight"][ids].astype(np.float64)
    theirs = model(**tensors({"inputs_embeds": embeds}), output_attentions=True)
    ours = forward(params, config, inputs_embeds=embeds)
    assert len(ours.attentions) == config.num_hidden_layers
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(ours.logits, forward(params, config, ids).logits)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name, side):
    config = CONFIGS[name]
    params, ids, lengths = random_params(config), make_prompts(config, 3, 9), [9, 5, 1]
    mask = make_mask(side, lengths)
    ids[mask == 0] = 1
    ours = forward(params, config, ids, mask)
    assert np.isfinite(ours.logits).all()
    for row in range(3):
        real = mask[row] > 0
        bare = forward(params, config, ids[row, real][None])
        np.testing.assert_allclose(ours.logits[row, real], bare.logits[0], rtol=0, atol=1e-12)


def test_a_token_sees_only_what_is_before_it():
    params, ids = random_params(PRE_LN), make_prompts(PRE_LN, 1, 9)
    changed = ids.copy()
    changed[0, 5] = 3 if ids[0, 5] != 3 else 4
    a, b = (forward(params, PRE_LN, x).logits[0] for x in (ids, changed))
    np.testing.assert_array_equal(a[:5], b[:5])
    assert (np.abs(a[5:] - b[5:]).max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("name", CONFIGS)
def test_random_parameters_hide_nothing(name):
    config = CONFIGS[name]
    params = random_params(config)
    for key, value in params.items():
        assert value.dtype == np.float32
        assert len(np.unique(value)) > 0.99 * value.size or value.ndim > 1, key
        rows = value.reshape(len(value), -1)
        assert np.abs(rows).max(axis=1).min() > 0, f"{key} has a row of zeros"
    other = random_params(config, "question_answering")
    shared = params.keys() & other.keys()
    assert all((params[key] == other[key]).all() for key in shared)
    assert all((params[key] != value).any() for key, value in random_params(config, seed=1).items())

    text = oracle_generation.greedy(params, config, make_prompts(config, 4, 6), max_new_tokens=60)[
        :, 6:
    ]
    assert np.mean([len(set(row)) for row in text]) > 8, "greedy text is stuck"
    assert len({tuple(row[-20:]) for row in text}) == 4, "different prompts end in one text"


@pytest.mark.hf
def test_lm_loss_equals_transformers():
    ids = make_prompts(PRE_LN, 3, 9)
    labels = np.where(np.random.default_rng(0).random(ids.shape) < 0.3, -100, ids)
    # transformers takes its loss in float32.
    theirs = reference(PRE_LN)(**tensors({"input_ids": ids, "labels": labels})).loss.item()
    logits = forward(random_params(PRE_LN), PRE_LN, ids).logits
    assert oracle.lm_loss(logits, labels) == pytest.approx(theirs, abs=1e-6)
    by_token = [
        -oracle.sequence_log_probability(random_params(PRE_LN), PRE_LN, row, 1) for row in ids
    ]
    assert oracle.lm_loss(logits, ids) == pytest.approx(sum(by_token) / (3 * 8), abs=1e-12)


CLASSES = {
    "regression": (1, None, np.array([0.3, -1.2, 2.0])),
    "regression_of_three": (3, "regression", np.arange(9.0).reshape(3, 3)),
    "single_label": (4, None, np.array([3, 0, 1])),
    "multi_label": (4, None, np.array([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])),
}


@pytest.mark.hf
@pytest.mark.parametrize("name", CLASSES)
def test_classification_equals_transformers(name):
    num_labels, problem, labels = CLASSES[name]
    config = CONFIGS["post_ln"].replace(num_labels=num_labels, problem_type=problem)
    params = random_params(config, "sequence_classification")
    for side in ("left", "right"):
        ids, mask = make_prompts(config, 3, 9), make_mask(side, [9, 5, 2])
        ids[mask == 0] = 1
        arrays = {"input_ids": ids, "attention_mask": mask}
        model = reference(config, "OPTForSequenceClassification")
        theirs = model(**tensors({**arrays, "labels": labels}))
        ours = oracle.classify(params, config, **arrays)
        np.testing.assert_allclose(ours, theirs.logits.numpy(), rtol=0, atol=1e-11)
        loss = oracle.classification_loss(ours, labels, config)
        assert loss == pytest.approx(theirs.loss.item(), abs=1e-11)
    embeds = np.random.default_rng(0).standard_normal((3, 5, config.embed_dim))
    theirs = model(**tensors({"inputs_embeds": embeds})).logits.numpy()
    ours = oracle.classify(params, config, inputs_embeds=embeds)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.hf
def test_question_answering_equals_transformers():
    ids, mask = make_prompts(PRE_LN, 3, 9), make_mask("right", [9, 6, 8])
    starts, ends = np.array([2, 9, -4]), np.array([4, 30, 8])
    model = reference(PRE_LN, "OPTForQuestionAnswering")
    arrays = {"input_ids": ids, "attention_mask": mask}
    theirs = model(**tensors({**arrays, "start_positions": starts, "end_positions": ends}))
    ours = oracle.answer_span(random_params(PRE_LN, "question_answering"), PRE_LN, **arrays)
    np.testing.assert_allclose(ours[0], theirs.start_logits.numpy(), rtol=0, atol=1e-11)
    np.testing.assert_allclose(ours[1], theirs.end_logits.numpy(), rtol=0, atol=1e-11)
    loss = oracle.answer_span_loss(*ours, starts, ends)
    assert loss == pytest.approx(theirs.loss.item(), abs=1e-11)
