"""Undocumented names of Keras: they are there, and where one is not, results are the same."""

from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import keras
import tensorflow as tf

import opt_tf
from opt_core.errors import ConfigError, InputError, OPTError
from opt_core.training.config import TrainConfig
from opt_tf import _private, lora, training
from tests.support.configs import CONFIGS
from tests.support.tiers import tiered

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1, dropout=0.0, attention_dropout=0.0)
IDS = np.arange(5, 15, dtype=np.int32).reshape(2, 5)
TRAIN = TrainConfig(learning_rate=1e-3, lora_rank=2)


def model_of(**options):
    return opt_tf.TFOPTForCausalLM(CONFIG, seed=1, **options)


def without(monkeypatch, *names):
    """Renames what Keras calls so in the eyes of `_private`: Keras itself still needs it."""

    class Blind:
        def __init__(self, whole):
            vars(self)["whole"] = whole

        def __getattr__(self, name):
            if name in names:
                raise AttributeError(name)
            return getattr(vars(self)["whole"], name)

        def __setattr__(self, name, value):
            setattr(vars(self)["whole"], name, value)

    for function in ("replace_layer", "has_compiled_loss", "moments"):
        whole = getattr(_private, function)
        monkeypatch.setattr(
            _private, function, lambda first, *rest, whole=whole: whole(Blind(first), *rest)
        )


def test_every_name_is_in_the_installed_version():
    model = model_of()
    assert getattr(OPTError, "_keras_call_info_injected") is True  # noqa: B009
    assert model._convert_input_args is False
    assert "_convert_input_args" in vars(keras.layers.Dense(1)), "Keras reads it"
    assert model in model._flatten_layers()
    tracker = model._tracker
    assert {"locked", "lock", "unlock", "untrack"} <= set(dir(tracker))
    model.compile("sgd", loss="mse")
    assert model._compile_loss is not None
    optimizer = training.make_optimizer(model_of(), TRAIN)
    assert optimizer._get_variable_index(optimizer._trainable_variables[1]) == 1
    assert len(optimizer._momentums) == len(optimizer._velocities)
    out = model(IDS, use_cache=False)
    assert keras.tree.flatten(out) == [out.logits]
    assert tf.nest.flatten(out, expand_composites=True)


def test_layers_are_found_without_keras_list(monkeypatch):
    model = model_of()
    lora.apply(model, 2)
    known = {id(layer) for layer in _private.sublayers(model)}
    monkeypatch.delattr(keras.layers.Layer, "_flatten_layers")
    found = _private.sublayers(model)
    assert {id(layer) for layer in found} == known
    assert len(found) == len(known)
    assert len(lora.adapters(model)) == 2
    with pytest.raises(OPTError, match="adapters"):
        model.save_pretrained("nowhere")


def test_layers_cannot_be_replaced_without_a_tracker(monkeypatch):
    without(monkeypatch, "_tracker")
    with pytest.raises(ConfigError, match=r"^[vq]_proj: .* Keras 3.15, which Keras \S+ lacks$"):
        lora.apply(model_of(), 2)
    with pytest.raises(ConfigError, match="which Keras"):
        model_of(quantize="int8")
    assert model_of()(IDS).logits is not None


@pytest.fixture
def eagerly() -> Iterator[None]:
    """Operation by operation: for a step or three tokens that takes less time than a program."""
    tf.config.run_functions_eagerly(True)
    yield
    tf.config.run_functions_eagerly(False)


@pytest.mark.usefixtures("eagerly")
def test_a_step_is_the_same_without_keras_lists_of_moments(monkeypatch):
    losses, weights = [], []
    for hidden in ((), ("_get_variable_index",), ("_momentums", "_velocities")):
        with monkeypatch.context() as patch:
            without(patch, *hidden)
            model = model_of()
            optimizer = training.make_optimizer(model, TRAIN)
            losses.append([training.train_step(model, optimizer, IDS, TRAIN, i) for i in range(2)])
            lora.merge(model)
            weights.append([v.numpy() for v in model.variables])
    for found in losses[1:]:
        np.testing.assert_array_equal(found, losses[0])
    for found in weights[1:]:
        for ours, first in zip(found, weights[0], strict=True):
            np.testing.assert_array_equal(ours, first)


@pytest.mark.parametrize("hidden", tiered([["_compile_loss"], []], bool))
def test_fit_knows_whether_it_was_given_a_loss(monkeypatch, hidden):
    without(monkeypatch, *hidden)
    model = model_of()
    model.compile(training.make_optimizer(model, TRAIN), run_eagerly=True)
    own = model.fit(IDS, epochs=1, verbose=0).history["loss"][0]
    model = model_of()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(), loss=loss, run_eagerly=True)
    given = model.fit(IDS, IDS, epochs=1, verbose=0).history["loss"][0]
    assert own != given
    assert model.predict(IDS, verbose=0).shape == (2, 5, CONFIG.vocab_size)


@pytest.mark.usefixtures("eagerly")
def test_inputs_that_keras_converts_give_the_same(monkeypatch):
    expected = model_of()(IDS, labels=IDS.tolist())
    monkeypatch.setattr(_private, "keep_inputs", lambda model: None)
    model = model_of()
    for ids in (IDS, IDS.tolist(), tf.constant(IDS)):
        found = model(ids, None, labels=IDS.tolist())
        np.testing.assert_array_equal(found.logits, expected.logits)
        np.testing.assert_array_equal(found.loss, expected.loss)
    np.testing.assert_array_equal(
        model.generate(IDS, max_new_tokens=3), model_of().generate(IDS, max_new_tokens=3)
    )


def test_errors_say_the_same_without_the_mark(monkeypatch):
    monkeypatch.delattr(OPTError, "_keras_call_info_injected")
    with pytest.raises(InputError, match="expected values in 0"):
        model_of()([[CONFIG.vocab_size]])
