"""Models in Keras' own files, and inside Keras' own models."""

import json
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import keras
import tensorflow as tf

from opt_core import TrainConfig
from opt_tf import training
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.tf_models import QUIET, model_of


@pytest.mark.parametrize("variant", [*CONFIGS, "untied"])
def test_keras_files_keep_everything(folder, variant, tmp_path):
    config = CONFIGS.get(variant) or CONFIGS["pre_ln"].replace(tie_word_embeddings=False)
    model, ids = model_of(folder, config, attn_implementation="eager"), make_prompts(config, 2, 9)
    model.generation_config = model.generation_config.replace(eos_token_id=(5, 6), max_length=30)
    expected = model(ids).logits
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(ids).logits, expected)
    assert loaded.config == model.config
    assert loaded.generation_config == model.generation_config
    assert loaded.attn_implementation == "eager"
    model.save_weights(tmp_path / "model.weights.h5")
    other: Any = opt_tf.TFOPTForCausalLM(config, seed=5)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other(ids).logits, expected, rtol=0, atol=2e-5)


def test_training_resumes_where_a_model_was_saved(folder, tmp_path):
    """The optimizer's state and rules travel in the .keras file."""
    ids = make_prompts(QUIET, 8, 9)
    model = model_of(folder, QUIET)
    optimizer = training.make_optimizer(model, TrainConfig(learning_rate=1e-3))
    model.compile(optimizer=optimizer, run_eagerly=True)
    model.fit(ids, batch_size=8, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.run_eagerly = True
        each.fit(ids, batch_size=8, verbose=0, shuffle=False)
    for a, b in zip(loaded.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=a.path)


def test_keras_functional_models_can_contain_ours(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 9)
    inputs = keras.Input((None,), dtype="int32")
    outer = keras.Model(inputs, keras.ops.argmax(model(inputs).logits, -1))
    np.testing.assert_array_equal(outer(ids), tf.argmax(model(ids).logits, -1))


def test_the_tokenizer_is_in_the_file(texts, tmp_path):
    """As KerasHub keeps it: a model that was loaded reads texts."""
    folder, tokenizer = texts
    preprocessor = opt_tf.OPTCausalLMPreprocessor(tokenizer, sequence_length=12)
    model: Any = opt_tf.TFOPTForCausalLM.from_pretrained(folder)
    for given, length in ((tokenizer, None), (preprocessor, 12), (None, None)):
        model.preprocessor = given
        model.save(tmp_path / "model.keras")
        again: Any = keras.saving.load_model(tmp_path / "model.keras")
        assert type(again.preprocessor) is type(given)
        assert getattr(again.preprocessor, "sequence_length", None) == length
        read = getattr(again.preprocessor, "tokenizer", again.preprocessor)
        assert given is None or read.get_vocab() == tokenizer.get_vocab()


def test_a_preprocessor_is_serialised_with_its_tokenizer(texts):
    _, tokenizer = texts
    made = opt_tf.OPTCausalLMPreprocessor(tokenizer, sequence_length=7, add_end_token=False)
    text = json.dumps(keras.saving.serialize_keras_object(made))
    again: Any = keras.saving.deserialize_keras_object(json.loads(text))
    assert type(again) is opt_tf.OPTCausalLMPreprocessor
    assert again.get_config() == made.get_config()
    found, expected = again("hello there"), made("hello there")
    np.testing.assert_array_equal(found[0]["token_ids"], expected[0]["token_ids"])
    np.testing.assert_array_equal(found[1], expected[1])
