"""A model's output in Keras' fit, evaluate and predict."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_tf import _private
from opt_tf.decoder import TFOPTOutput
from opt_tf.inputs import as_integers, check_range


class Fitted(keras.Model):
    """A Keras model whose output is a `TFOPTOutput` and that may have a loss of its own."""

    config: OPTConfig

    def fit(self, x: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' fit; ids that come as an array are checked first, as XLA could not refuse them."""
        self._check(x)
        return super().fit(x, *args, **options)

    def evaluate(self, x: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' evaluate, of ids checked as in `fit`."""
        self._check(x)
        return super().evaluate(x, *args, **options)

    def predict(self, x: Any, *args: Any, **options: Any) -> Any:
        """Keras' predict, of ids checked as in `fit`."""
        self._check(x)
        return super().predict(x, *args, **options)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None,
        sample_weight: Any = None, training: bool = True,
    ) -> tf.Tensor:  # fmt: skip
        """The loss of Keras' fit and evaluate.

        A loss given to `compile` is applied to the logits and y. Without one it is the model's own,
        of the labels among the inputs, of y, or, for the language model, of the input ids.
        """
        if _private.has_compiled_loss(self):
            return super().compute_loss(x, y, self._predictions(y_pred), sample_weight, training)
        if sample_weight is not None:
            raise InputError("sample_weight needs a loss given to compile()")
        loss = y_pred.loss if y_pred.loss is not None else self._loss(x, y, y_pred)
        # As Keras does it: gradients are summed over the replicas.
        return loss / tf.distribute.get_strategy().num_replicas_in_sync

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Updates the metrics given to `compile`, which see the logits and y."""
        results: Any = super().compute_metrics(x, y, self._predictions(y_pred), sample_weight)
        if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
            # Keras 3.15 takes the mean over workers along an axis, which scalars do not have.
            results = keras.tree.map_structure(lambda result: tf.reshape(result, (1,)), results)
        return results

    def predict_step(self, data: Any) -> Any:
        """The logits: they are what Keras' predict returns."""
        return self._predictions(super().predict_step(data))

    def _check(self, x: Any) -> None:
        ids = x.get("input_ids") if isinstance(x, Mapping) else x
        if isinstance(ids, np.ndarray) or tf.is_tensor(ids):
            count = self.config.vocab_size
            tensor: Any = as_integers("input_ids", ids)
            check_range("input_ids", tensor, 0, count - 1, f"vocab_size={count}")

    def _predictions(self, output: TFOPTOutput) -> Any:
        return output.logits

    def _loss(self, x: Any, y: Any, output: TFOPTOutput) -> tf.Tensor:
        raise InputError(f"{type(self).__name__} has no loss of its own; give one to compile()")
