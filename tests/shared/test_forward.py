"""Every model, head and option against the float64 oracle."""

import dataclasses
import importlib

import numpy as np
import pytest

from opt_core.errors import ConfigError, InputError, OPTError
from opt_core.outputs import ModelOutput
from opt_core.params import param_specs
from tests.support import oracle
from tests.support.backends import ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts

pytestmark = pytest.mark.dealt

PRE_LN = CONFIGS["pre_ln"]
VARIANTS = {
    **CONFIGS,
    "untied": PRE_LN.replace(tie_word_embeddings=False),
    "untied_post_ln": CONFIGS["post_ln"].replace(tie_word_embeddings=False),
    # One layer: without the norm the logits grow with depth, and float32 errors with them.
    "no_final_norm": PRE_LN.replace(_remove_final_layer_norm=True, num_hidden_layers=1),
    "projected_pre_ln": PRE_LN.replace(word_embed_proj_dim=24),
    "no_bias": PRE_LN.replace(enable_bias=False),
    "no_affine": PRE_LN.replace(layer_norm_elementwise_affine=False),
    **{
        f"activation_{name}": PRE_LN.replace(activation_function=name)
        for name in oracle.ACTIVATIONS
    },
}
INPUTS = {
    "bare": {},
    "ones": {"attention_mask": make_mask("left", [9, 9, 9])},
    "left": {"attention_mask": make_mask("left", [9, 5, 1])},
    "right": {"attention_mask": make_mask("right", [9, 5, 1])},
    "holes": {"attention_mask": np.array([[0, 1, 1, 0, 1, 1, 1, 0, 1], [1] * 9, [1, 0] * 4 + [1]])},
    "positions": {"position_ids": np.random.default_rng(1).integers(0, 500, (3, 9))},
    "positions_and_mask": {
        "attention_mask": make_mask("left", [9, 5, 1]),
        "position_ids": np.random.default_rng(1).integers(-1, 500, (3, 9)),
    },
}


def attended(ids, inputs):
    """Where the output is defined: a padded query before the first token sees nothing."""
    mask = inputs.get("attention_mask", np.ones_like(ids))
    return np.cumsum(mask, 1) > 0


def close(ours, theirs, tolerance=ORACLE_TOLERANCE):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_the_oracle(backend, folder, variant, inputs):
    config, inputs = VARIANTS[variant], INPUTS[inputs]
    ids = make_prompts(config, 3, 9)
    ours = backend.run(backend.load(folder(config)), input_ids=ids, **inputs)
    theirs = oracle.forward(oracle.random_params(config), config, ids, **inputs)
    where = attended(ids, inputs)
    close(ours.logits[where], theirs.logits[where])
    assert np.isfinite(ours.logits).all()


@pytest.mark.parametrize("inputs", ["bare", "left", "right"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_hidden_states_and_attentions_equal_the_oracle(backend, folder, variant, inputs):
    config, inputs = VARIANTS[variant], INPUTS[inputs]
    ids = make_prompts(config, 3, 9)
    model = backend.load(folder(config, "none"), "none")
    ours = backend.run(
        model, input_ids=ids, output_hidden_states=True, output_attentions=True, **inputs
    )
    theirs = oracle.forward(oracle.random_params(config, "none"), config, ids, **inputs)
    where = attended(ids, inputs)
    close(ours.last_hidden_state[where], theirs.last_hidden_state[where])
    for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
        close(a[where], b[where])
    for a, b in zip(ours.attentions, theirs.attentions, strict=True):
        close(a.transpose(0, 2, 1, 3)[where], b.transpose(0, 2, 1, 3)[where])


@pytest.mark.parametrize("variant", CONFIGS)
def test_embeddings_in_place_of_ids(backend, folder, variant):
    config = CONFIGS[variant]
    embeds = np.random.default_rng(0).standard_normal((3, 9, config.embed_dim), np.float32)
    ours = backend.run(backend.load(folder(config)), inputs_embeds=embeds)
    theirs = oracle.forward(oracle.random_params(config), config, inputs_embeds=embeds)
    close(ours.logits, theirs.logits)


def test_nothing_asked_nothing_returned(backend, folder):
    ids = make_prompts(PRE_LN, 1, 4)
    out = backend.call(backend.load(folder("pre_ln")), input_ids=ids, use_cache=False)
    assert list(out) == ["logits"]
    assert all(getattr(out, name) is None for name in ModelOutput.__annotations__.keys() - out)


@pytest.mark.parametrize("variant", CONFIGS)
def test_language_model_loss(backend, folder, variant):
    config = CONFIGS[variant]
    ids = make_prompts(config, 3, 9)
    labels = np.where(np.random.default_rng(2).random(ids.shape) < 0.3, -100, ids)
    out = backend.run(backend.load(folder(config)), input_ids=ids, labels=labels)
    logits = oracle.forward(oracle.random_params(config), config, ids).logits
    close(out.loss, oracle.lm_loss(logits, labels))


CLASSIFICATION = {
    "single": (3, None, np.array([2, 0, 1])),
    "regression": (1, None, np.array([0.5, -1.0, 2.0], np.float32)),
    "several_targets": (3, "regression", np.random.default_rng(0).random((3, 3), np.float32)),
    "multi": (3, None, np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], np.float32)),
    "named": (3, "single_label_classification", np.array([1, 1, 0])),
}


@pytest.mark.parametrize("task", CLASSIFICATION)
@pytest.mark.parametrize("variant", CONFIGS)
def test_sequence_classification(backend, folder, variant, task):
    labels_count, problem, labels = CLASSIFICATION[task]
    config = CONFIGS[variant].replace(num_labels=labels_count, problem_type=problem)
    ids = make_prompts(config, 3, 9)
    pad = config.pad_token_id
    assert pad is not None
    ids[0, 6:], ids[1, :4] = pad, pad
    mask = (ids != pad).astype(int)
    head = "sequence_classification"
    model = backend.load(folder(config, head), head)
    out = backend.run(model, input_ids=ids, attention_mask=mask, labels=labels)
    logits = oracle.classify(oracle.random_params(config, head), config, ids, attention_mask=mask)
    close(out.logits, logits)
    close(out.loss, oracle.classification_loss(logits, labels, config))


@pytest.mark.parametrize("variant", CONFIGS)
def test_question_answering(backend, folder, variant):
    config, head = CONFIGS[variant], "question_answering"
    ids = make_prompts(config, 3, 9)
    starts, ends = np.array([0, 3, 9]), np.array([2, 8, 50])
    model = backend.load(folder(config, head), head)
    out = backend.run(model, input_ids=ids, start_positions=starts, end_positions=ends)
    logits = oracle.answer_span(oracle.random_params(config, head), config, ids)
    close(out.start_logits, logits[0])
    close(out.end_logits, logits[1])
    close(out.loss, oracle.answer_span_loss(*logits, starts, ends))


def test_a_fresh_model_is_initialised_as_published(backend):
    config = CONFIGS["post_ln"].replace(init_std=0.05, vocab_size=4000)
    model = backend.model_class("none")(config, seed=3)
    same, other = (backend.model_class("none")(config, seed=s) for s in (3, 4))
    ids = make_prompts(config, 1, 5)
    outs = [backend.run(m, input_ids=ids).last_hidden_state for m in (model, same, other)]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 0.01
    from opt_core.initialization import initial_value

    values = {s.name: initial_value(s, config, 3) for s in param_specs(config, "none")}
    tokens = values["model.decoder.embed_tokens.weight"]
    assert abs(tokens.std() - 0.05) < 0.001
    assert (tokens[config.pad_token_id] == 0).all()
    assert (values["model.decoder.layers.0.final_layer_norm.weight"] == 1).all()
    assert (values["model.decoder.layers.0.fc1.bias"] == 0).all()
    close(outs[0], oracle.forward(values, config, ids).last_hidden_state)


BAD_INPUTS = {
    "id too large": ({"input_ids": [[2, 99]]}, "input_ids.*0..98.*99"),
    "id negative": ({"input_ids": [[2, -1]]}, "input_ids.*-1"),
    "fractions": ({"input_ids": [[2.0, 3.5]]}, "input_ids: expected integers"),
    "no dimension": ({"input_ids": 2}, "input_ids"),
    "ragged": ({"input_ids": [[2, 3], [4]]}, "input_ids"),
    "empty": ({"input_ids": np.zeros((1, 0), int)}, "empty"),
    "nothing": ({}, "either input_ids or inputs_embeds"),
    "both": ({"input_ids": [[2]], "inputs_embeds": np.zeros((1, 1, 32), np.float32)}, "either"),
    "narrow embeddings": ({"inputs_embeds": np.zeros((1, 1, 31), np.float32)}, "inputs_embeds.*32"),
    "mask width": ({"input_ids": [[2, 3]], "attention_mask": [[1, 1, 1]]}, "attention_mask"),
    "mask value": ({"input_ids": [[2, 3]], "attention_mask": [[1, 2]]}, "attention_mask"),
    "position width": ({"input_ids": [[2, 3]], "position_ids": [[1]]}, "position_ids"),
    "position too far": ({"input_ids": [[2, 3]], "position_ids": [[0, 512]]}, "position_ids.*511"),
    "too long": ({"input_ids": np.full((1, 513), 5)}, "513.*max_position_embeddings=512"),
    "no rows": ({"input_ids": np.zeros((0, 3), int)}, "the input is empty"),
    "label outside": ({"input_ids": [[2, 3]], "labels": [[2, 99]]}, "labels.*0..98.*99"),
    "label negative": ({"input_ids": [[2, 3]], "labels": [[2, -1]]}, "labels.*-1"),
    "label floats": ({"input_ids": [[2, 3]], "labels": [[2.0, 3.0]]}, "labels: expected integers"),
    "texts": ({"input_ids": [["a", "b"]]}, "input_ids: expected numbers"),
    "logits to keep": ({"input_ids": [[2, 3]], "logits_to_keep": -1}, "logits_to_keep"),
    "labels shape": ({"input_ids": [[2, 3]], "labels": [[2]]}, "labels"),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
def test_bad_inputs_raise_one_clear_line(backend, folder, case):
    inputs, message = BAD_INPUTS[case]
    with pytest.raises(InputError, match=message) as error:
        backend.load(folder("pre_ln"))(**inputs)
    assert "\n" not in str(error.value)


def test_padding_may_outgrow_the_window(backend, folder):
    """Positions count tokens, so only tokens count against the window."""
    model = backend.load(folder(PRE_LN.replace(max_position_embeddings=9)))
    ids = np.full((3, 18), 5)
    mask = np.ones_like(ids)
    mask[:, :9] = 0
    padded = backend.run(model, input_ids=ids, attention_mask=mask).logits
    close(padded[:, 9:], backend.run(model, input_ids=ids[:, 9:]).logits)


def test_a_fresh_head_warns(backend, folder):
    """At the user's own call, which is in this file."""
    config, kind = PRE_LN.replace(num_labels=5), backend.model_class("sequence_classification")
    with pytest.warns(UserWarning, match=r"no score\.weight in this checkpoint") as caught:
        model = kind.from_pretrained(folder("pre_ln"), config=config)
    assert "it is freshly initialised and needs training" in str(caught[0].message)
    assert caught[0].filename == __file__
    checkpoint = importlib.import_module(f"opt_{backend.name}.checkpoint")
    (spec,) = (s for s in param_specs(config, model.head) if s.name == "score.weight")
    weight = backend.numpy(checkpoint.get_parameter(model, spec))
    assert weight.shape == (5, 32)
    assert 0 < weight.std() < 0.1


def test_an_unknown_attention_implementation(backend, folder):
    with pytest.raises(ConfigError, match=r"attn_implementation.*'flash'"):
        backend.load(folder("pre_ln"), attn_implementation="flash")


def test_errors_are_value_errors():
    assert issubclass(InputError, ValueError)
    assert issubclass(InputError, OPTError)
    assert dataclasses.is_dataclass(PRE_LN)


def test_any_integers_are_ids(backend, folder):
    model = backend.load(folder("pre_ln"))
    expected = backend.run(model, input_ids=np.array([[2, 5, 6]])).logits
    for kind in (np.int16, np.uint8, np.int32):
        close(backend.run(model, input_ids=np.array([[2, 5, 6]], kind)).logits, expected, 0)


HEAD_ERRORS = {
    "class outside": ("sequence_classification", {"labels": [2]}, "labels.*0..1.*2"),
    "classes shape": ("sequence_classification", {"labels": [0, 1]}, "labels: expected integers"),
    "one position": ("question_answering", {"start_positions": [0]}, "belong together"),
    "positions shape": (
        "question_answering", {"start_positions": [0, 1], "end_positions": [1]}, "start_positions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HEAD_ERRORS)
def test_bad_labels_of_heads(backend, folder, case):
    head, labels, message = HEAD_ERRORS[case]
    with pytest.raises(InputError, match=message):
        backend.load(folder("pre_ln", head), head)([[2, 5, 6]], **labels)


def test_a_batch_of_texts_needs_a_padding_id(backend, folder):
    """transformers' rule: without one, where a text ends cannot be known."""
    head = "sequence_classification"
    model = backend.load(folder(PRE_LN.replace(pad_token_id=None), head), head)
    assert backend.run(model, input_ids=np.array([[2, 5]])).logits.shape == (1, 2)
    with pytest.raises(InputError, match="needs pad_token_id"):
        model([[2, 5], [2, 6]])
