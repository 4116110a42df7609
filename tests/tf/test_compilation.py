"""Compiled programs: what is compiled how often, and what may go through them."""

import os

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import tensorflow as tf

from opt_tf import compilation
from tests.support import oracle
from tests.support.backends import ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tf_models import model_of, python
from tests.support.tiers import tiered

COUNT = """
    import sys
    from pathlib import Path
    import opt_tf  # it has Keras use TensorFlow, which nothing else here tells it
    import keras
    from opt_tf import compilation
    print(keras.config.backend())
    from tests.support.configs import CONFIGS
    from tests.support.reference import make_mask, make_prompts
    compilation.SMALL = 0
    model = opt_tf.TFOPTForCausalLM(CONFIGS["pre_ln"].replace(num_hidden_layers=1))
    def report():
        print(len(list(Path(sys.argv[1]).glob("*before_optimizations.txt"))))
    settings = {
        "eos_token_id": None, "do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4]], "max_new_tokens": 40,
    }
    for length, changes in (
        (5, {"seed": 1, "temperature": 0.7}),
        (9, {"seed": 2, "temperature": 1.3, "top_p": 0.5}),
        (30, {"temperature": 0.5, "repetition_penalty": 1.4, "max_new_tokens": 33}),
        (12, {"temperature": 0.6, "attention_mask": make_mask("left", [12, 4])}),
    ):
        model.generate(make_prompts(model.config, 2, length), **settings | changes)
    report()
    for length in (5, 9):
        list(model.stream(make_prompts(model.config, 2, length), **settings, temperature=length))
    report()
    for length in (5, 9):
        prompts = make_prompts(model.config, 2, length)
        model.generate(prompts, max_new_tokens=length, num_beams=3, length_penalty=length / 8)
    report()
    drafts = {"prompt_lookup_num_tokens": 3, "eos_token_id": None, "max_new_tokens": 20}
    for lengths in ((5, 9), (12, 7)):
        for length in lengths:
            model.generate(make_prompts(model.config, 2, length, seed=length), **drafts)
        report()
"""


def test_another_prompt_or_setting_compiles_nothing(tmp_path):
    """XLA writes down each program it compiles: prompts, the first token, others; per shape."""
    # Nothing is compiled that a run before has kept.
    result = python(
        COUNT,
        None,
        str(tmp_path),
        TF_XLA_FLAGS="",
        XLA_FLAGS=f"{os.environ['XLA_FLAGS']} --xla_dump_to={tmp_path}",
    )
    # A stream has the first two already. With drafts there are passes that check some, or none.
    assert result.stdout.split() == ["tensorflow", "3", "4", "6", "9", "9"], result.stderr


def test_small_models_are_not_compiled(monkeypatch):
    """Of programs: parts of them belong to what calls them. A device may have more to gain."""
    made: list[bool | None] = []
    function = tf.function

    def watched(*args, jit_compile=None, **options):
        made.append(jit_compile)
        return function(*args, **options)

    monkeypatch.setattr(tf, "function", watched)
    model = opt_tf.TFOPTForCausalLM(CONFIGS["post_ln"])
    size = model.count_params()
    for limit, devices, expected in (
        (size, [], None),
        (size - 1, [], True),
        (size, ["a card"], True),
    ):
        monkeypatch.setattr("opt_tf.compilation.SMALL", limit)
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind, found=devices: found)
        made.clear()
        model.programs.clear()
        assert compilation.compiled(model, lambda model, x: x + 1)(tf.constant(1)) == 2
        assert compilation.traced(model, lambda model, x: x + 2)(tf.constant(1)) == 3
        assert made == [expected, None]


@pytest.mark.xla
def test_generation_follows_the_weights(folder):
    """Programs read the weights anew: none is kept inside them."""
    config = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
    model, ids = model_of(folder, config), make_prompts(config, 2, 5)
    settings = {"max_new_tokens": 8, "eos_token_id": None}
    before = model.generate(ids, **settings).numpy()
    other = opt_tf.TFOPTForCausalLM(config, seed=4)
    for a, b in zip(model.trainable_variables, other.trainable_variables, strict=True):
        a.assign(b)
    after = model.generate(ids, **settings).numpy()
    np.testing.assert_array_equal(after, other.generate(ids, **settings))
    assert (before != after).any()


@pytest.mark.parametrize(
    ("variant", "compiled"),
    tiered(
        [(variant, compiled) for variant in CONFIGS for compiled in (False, True)],
        lambda variant, compiled: compiled or variant == "pre_ln",
    ),
)
def test_compiled_logits_equal_the_oracle(folder, variant, compiled):
    config, model = CONFIGS[variant], model_of(folder, variant)
    ids, mask = make_prompts(config, 3, 9), make_mask("left", [9, 5, 1])
    run = tf.function(lambda *x: model(*x).logits, jit_compile=compiled)
    theirs = oracle.forward(oracle.random_params(config), config, ids, attention_mask=mask).logits
    ours, seen = run(tf.constant(ids), tf.constant(mask)).numpy(), np.cumsum(mask, 1) > 0
    np.testing.assert_allclose(ours[seen], theirs[seen], rtol=0, atol=ORACLE_TOLERANCE)


def test_any_shape_can_be_traced_at_once(folder):
    model = model_of(folder)
    run = tf.function(
        lambda ids, mask: model(ids, attention_mask=mask, labels=ids),
        input_signature=[tf.TensorSpec((None, None), tf.int32)] * 2,
    )
    for batch, length in ((2, 5), (3, 9)):
        ids, mask = make_prompts(model.config, batch, length), np.ones((batch, length), int)
        mask[0, :2] = 0
        out, eager = run(ids.astype(np.int32), mask), model(ids, attention_mask=mask, labels=ids)
        np.testing.assert_allclose(out.logits, eager.logits, rtol=0, atol=2e-5)
        np.testing.assert_allclose(out.loss, eager.loss, rtol=1e-5)
