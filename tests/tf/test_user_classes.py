"""Classes of a user's own, which extend a model by layers and a `call`."""

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import keras

from opt_tf import TFOPTModel
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
IDS, MASK = make_prompts(CONFIG, 2, 5), np.array([[1] * 5, [1, 1, 1, 0, 0]])


class OfInputs(TFOPTModel):
    """Keras' habit: one argument for all inputs."""

    def __init__(self, config, **options):
        super().__init__(config, **options)
        self.classifier = keras.layers.Dense(3, kernel_initializer="ones")

    def call(self, inputs, training=False, **kwargs):
        out = super().call(inputs, training=training, **kwargs)
        return self.classifier(out[0][:, 0])


class OfNames(TFOPTModel):
    """transformers' habit."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = keras.layers.Dense(3, kernel_initializer="ones")

    def call(self, input_ids=None, attention_mask=None, training=False):
        out = super().call(input_ids, attention_mask=attention_mask, training=training)
        return self.classifier(out[0][:, 0])


class OfAnything(TFOPTModel):
    """A call that passes on what it is given."""

    def __init__(self, config):
        super().__init__(config)
        self.classifier = keras.layers.Dense(3, kernel_initializer="ones")

    def call(self, *args, **kwargs):
        return self.classifier(super().call(*args, **kwargs)[0][:, 0])


@pytest.mark.filterwarnings("ignore:.*freshly initialised")
@pytest.mark.parametrize("kind", [OfInputs, OfNames, OfAnything])
def test_inputs_arrive_however_call_names_them(kind, folder):
    model, plain = kind.from_pretrained(folder(CONFIG)), TFOPTModel.from_pretrained(folder(CONFIG))
    states = plain(IDS, attention_mask=MASK).last_hidden_state[:, 0].numpy()
    expected = np.repeat(states.sum(-1, keepdims=True), 3, 1)
    named = {"input_ids": IDS, "attention_mask": MASK}
    for found in (model(named), model([IDS, MASK]), model(IDS), model((IDS, MASK))):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    if kind is not OfInputs:
        np.testing.assert_allclose(model(**named), expected, atol=1e-4)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    before = np.array(model.classifier.kernel)
    model.fit(named, np.array([0, 2]), verbose=0)
    assert np.any(np.array(model.classifier.kernel) != before)
