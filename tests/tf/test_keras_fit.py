"""Keras' compile, fit, evaluate and predict."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import keras
import tensorflow as tf

from opt_core import TrainConfig
from opt_core.errors import InputError
from opt_core.params import param_specs
from opt_tf import training
from opt_tf.checkpoint import get_parameter
from tests.support.backends import make_backend
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tf_models import QUIET, history_of, model_of


def test_ids_alone_are_labels_too(folder):
    ids = make_prompts(QUIET, 4, 12)
    histories = []
    named: Any = {"input_ids": ids, "labels": ids}
    for data in (
        (ids,),
        ({"input_ids": ids},),
        ({"input_ids": ids, "attention_mask": np.ones_like(ids)},),
        ({"input_ids": ids, "labels": ids},),
        (ids, ids),
        (tf.data.Dataset.from_tensor_slices(ids).batch(4),),
        (tf.data.Dataset.from_tensor_slices(named).batch(4),),
    ):
        model = model_of(folder, QUIET)
        model.compile(optimizer=keras.optimizers.Adam(3e-3), run_eagerly=len(histories) > 0)
        batch = {} if isinstance(data[0], tf.data.Dataset) else {"batch_size": 4}
        epochs = 1 if histories else 2
        fitted = model.fit(*data, epochs=epochs, verbose=0, shuffle=False, **batch)
        histories.append(fitted.history["loss"])
    assert histories[0][-1] < histories[0][0] - 0.05
    for history in histories[1:]:
        np.testing.assert_allclose(history, histories[0][:1], rtol=1e-5)


def test_padding_is_no_label(folder):
    ids, mask = make_prompts(QUIET, 4, 9), make_mask("right", [9, 4, 7, 2])
    model = model_of(folder, QUIET)
    model.compile()
    given = model.evaluate({"input_ids": ids, "attention_mask": mask}, verbose=0)
    labels = np.where(mask, ids, -100)
    expected = model(ids, attention_mask=mask, labels=labels).loss
    np.testing.assert_allclose(given, expected, rtol=1e-5)


def test_a_loss_of_keras_sees_the_logits(folder):
    ids = make_prompts(QUIET, 8, 12)
    following = np.roll(ids, -1, 1)
    model = model_of(folder, QUIET)
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        run_eagerly=True,  # two steps take less time than a program
    )
    weights = np.ones((8, 12))
    history = history_of(model, ids, following, sample_weight=weights, batch_size=8, epochs=2)
    assert history["loss"][-1] < history["loss"][0]
    assert 0 <= history["accuracy"][-1] <= 1


def test_heads_are_fitted(folder):
    ids = make_prompts(QUIET, 16, 9)
    head = "sequence_classification"
    model: Any = opt_tf.TFOPTForSequenceClassification.from_pretrained(folder(QUIET, head))
    model.compile(optimizer=keras.optimizers.Adam(3e-3), metrics=["accuracy"])
    classes = ids[:, 3] % 2
    assert history_of(model, ids, classes, epochs=15)["accuracy"][0] < 1
    assert model.evaluate(ids, classes, verbose=0)[1] == 1
    assert model.predict(ids, verbose=0).shape == (16, 2)
    with pytest.raises(InputError, match="expected labels among the inputs or as y"):
        history_of(model, ids)
    answers: Any = opt_tf.TFOPTForQuestionAnswering.from_pretrained(
        folder(QUIET, "question_answering")
    )
    answers.compile(optimizer=keras.optimizers.Adam(1e-3), run_eagerly=True)
    starts = ids[:, 3] % 9
    inputs = {"input_ids": ids, "start_positions": starts, "end_positions": starts}
    history = history_of(answers, inputs, batch_size=16, epochs=2)
    assert history["loss"][-1] < history["loss"][0]
    np.testing.assert_allclose(
        answers.evaluate(ids, (starts, starts), verbose=0),
        answers.evaluate(inputs, verbose=0),
        rtol=1e-5,
    )
    plain: Any = opt_tf.TFOPTModel.from_pretrained(folder(QUIET, "none"))
    plain.compile(optimizer="adam")
    with pytest.raises(InputError, match="TFOPTModel has no loss of its own"):
        history_of(plain, ids)


@pytest.mark.xla
def test_predict_gives_the_logits(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 5, 9)
    logits = model.predict(ids, batch_size=2, verbose=0)
    assert isinstance(logits, np.ndarray)
    np.testing.assert_allclose(logits, model(ids).logits, rtol=0, atol=2e-5)
    answers: Any = opt_tf.TFOPTForQuestionAnswering(QUIET)
    assert [x.shape for x in answers.predict(ids, verbose=0)] == [(5, 9)] * 2


@pytest.mark.xla
def test_fit_is_a_loop_with_a_tape_is_torch(folder):
    """Step for step: the losses, and the parameters at the end."""
    # An epsilon above the gradients' rounding noise, of which AdamW would make steps.
    config = TrainConfig(
        max_steps=3, learning_rate=1e-3, lr_schedule="constant", max_grad_norm=0.5,
        adam_epsilon=1e-6,
    )  # fmt: skip
    batches = [make_prompts(QUIET, 4, 10, seed=i) for i in range(3)]
    fitted, taped, ours = (model_of(folder, QUIET) for _ in range(3))
    fitted.compile(optimizer=training.make_optimizer(fitted, config))
    losses = {"fit": [history_of(fitted, ids, epochs=1)["loss"][0] for ids in batches]}
    optimizer, losses["tape"] = training.make_optimizer(taped, config), []
    for ids in batches:
        with tf.GradientTape() as tape:
            loss = taped(ids, labels=ids, training=True).loss
        gradients = tape.gradient(loss, taped.trainable_variables)
        optimizer.apply_gradients(zip(gradients, taped.trainable_variables, strict=True))
        losses["tape"].append(float(loss))
    losses["ours"] = make_backend("tf").fit(ours, iter(batches), config)
    parameter_of = pytest.importorskip("opt_torch.checkpoint").get_parameter

    torch = make_backend("torch")
    theirs = torch.load(folder(QUIET))
    expected = torch.fit(theirs, iter(batches), config)
    assert expected[0] != pytest.approx(expected[-1], abs=0.01)
    for name, values in losses.items():
        np.testing.assert_allclose(values, expected, rtol=0, atol=1e-5, err_msg=name)
    for spec in param_specs(QUIET):
        if not spec.name.endswith("k_proj.bias"):  # its gradient is nothing but rounding noise
            value = torch.to_array(parameter_of(theirs, spec))
            for model in (fitted, taped, ours):
                np.testing.assert_allclose(
                    get_parameter(model, spec), value, rtol=0, atol=1e-5, err_msg=spec.name
                )


@pytest.mark.xla
def test_ids_outside_the_vocabulary_are_refused_or_spoil_everything(folder):
    """XLA can refuse nothing and would take the nearest row: no plausible number may come out."""
    ids = make_prompts(QUIET, 4, 6)
    ids[1, 2] = 99
    model = model_of(folder, QUIET)
    model.compile()
    for method in (model.fit, model.evaluate, model.predict):
        for x in (ids, {"input_ids": ids}):
            with pytest.raises(InputError, match=r"input_ids: expected values in 0\.\.98.*99"):
                method(x, verbose=0)
    with pytest.raises(InputError, match="input_ids: expected integers"):
        model.fit(ids + 0.5, verbose=0)
    run = tf.function(lambda ids: model(ids).logits, jit_compile=True)
    for bad in (99, -1):
        ids[1, 2] = bad
        is_nan = np.isnan(run(tf.constant(ids))).all(-1)
        assert is_nan[1, 2:].all()
        assert not is_nan[[0, 2, 3]].any()
