"""TensorFlow behind the interface of `tests.support.backends`."""

from typing import Any

import tensorflow as tf

import opt_tf  # noqa: F401  it chooses Keras' backend
from opt_core.params import Head, param_specs
from opt_tf.checkpoint import locate
from tests.support.backends import Backend
from tests.support.oracle import Array

# Programs here run once or twice: rewriting their graphs takes longer than that saves.
tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": True})


class TFBackend(Backend):
    """TensorFlow."""

    def array(self, value: Any) -> tf.Tensor:
        return tf.constant(value)

    def differentiate(self, function: Any, *arrays: Array) -> tuple[Array, list[Array]]:
        tensors = [tf.constant(array) for array in arrays]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            value = function(*tensors)
        found: Any = tape.gradient(value, tensors)
        return value.numpy(), [gradient.numpy() for gradient in found]

    def random(self, seed: int) -> Any:
        return tf.constant([seed, 0], tf.int64)

    def seed_everything(self, seed: int) -> None:
        tf.random.set_seed(seed)

    def gradients(self, model: Any, head: Head, **inputs: Any) -> dict[str, Array]:
        specs = param_specs(model.config, head)
        with tf.GradientTape() as tape:
            loss = model(**inputs).loss
        found = tape.gradient(loss, [locate(model, spec).value for spec in specs])
        arrays = [tf.convert_to_tensor(gradient).numpy() for gradient in found]
        return {spec.name: array for spec, array in zip(specs, arrays, strict=True)}
