"""A model's output in Keras' fit, evaluate and predict."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_core.compatibility import keras_hub
from opt_core.compatibility.datasets import LABELS
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.training.microbatches import IGNORE_INDEX
from opt_tf import _private
from opt_tf.decoder import TFOPTOutput
from opt_tf.inputs import as_integers, check_range


class Fitted(keras.Model):
    """A Keras model whose output is a `TFOPTOutput` and that may have a loss of its own."""

    config: OPTConfig

    def fit(self, x: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' fit; ids that come as an array are checked first, as XLA could not refuse them.

        Texts, as a list, an array or a `tf.data.Dataset`, are turned into ids by `preprocessor`.
        """
        return super().fit(self._checked(x), *args, **options)

    def evaluate(self, x: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' evaluate, of ids checked as in `fit`."""
        return super().evaluate(self._checked(x), *args, **options)

    def predict(self, x: Any, *args: Any, **options: Any) -> Any:
        """Keras' predict, of ids checked as in `fit`."""
        return super().predict(self._checked(x), *args, **options)

    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None,
        sample_weight: Any = None, training: bool = True,
    ) -> tf.Tensor:  # fmt: skip
        """The loss of Keras' fit and evaluate.

        A loss given to `compile` is applied to the logits and y, or the labels among the inputs.
        Without one it is the model's own, of the labels among the inputs, of y (which may be a dict
        that has them), or, for the language model, of the input ids. Then `sample_weight`, (B,) or
        of the labels' shape, is a factor of what each label adds to the mean.
        """
        targets = _targets(x, y)
        if _private.has_compiled_loss(self):
            predictions = self._predictions(y_pred)
            return super().compute_loss(x, targets, predictions, sample_weight, training)
        if sample_weight is not None:
            loss = self._weighted_loss(x, targets, y_pred, sample_weight)
        else:
            loss = y_pred.loss if y_pred.loss is not None else self._loss(x, targets, y_pred)
        # As Keras does it: gradients are summed over the replicas.
        return loss / tf.distribute.get_strategy().num_replicas_in_sync

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Updates the metrics given to `compile`, which see the logits and y."""
        targets, predictions = self._labels(x, _targets(x, y)), self._predictions(y_pred)
        results: Any = super().compute_metrics(x, targets, predictions, sample_weight)
        if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
            # Keras 3.15 takes the mean over workers along an axis, which scalars do not have.
            results = keras.tree.map_structure(lambda result: tf.reshape(result, (1,)), results)
        return results

    def predict_step(self, data: Any) -> Any:
        """The logits: they are what Keras' predict returns."""
        return self._predictions(super().predict_step(data))

    def _checked(self: Any, x: Any) -> Any:
        """The inputs, texts among them turned into ids, and ids checked."""
        is_dataset = isinstance(x, tf.data.Dataset)
        if is_dataset and getattr(x.element_spec, "dtype", None) == tf.string:
            return x.map(self._encode_in_graph)
        texts = None if is_dataset else keras_hub.texts_of(x)
        x = x if texts is None else self._encode(texts)
        ids = x.get("input_ids") if isinstance(x, Mapping) else x
        if isinstance(ids, np.ndarray) or tf.is_tensor(ids):
            count = self.config.vocab_size
            tensor: Any = as_integers("input_ids", ids)
            check_range("input_ids", tensor, 0, count - 1, f"vocab_size={count}")
        return x

    def _encode(self: Any, texts: list[str]) -> dict[str, Any]:
        config = self.config
        longest, end = config.max_position_embeddings, config.eos_token_id
        return keras_hub.encode_texts(self.preprocessor, texts, config.pad_token_id, longest, end)

    def _encode_in_graph(self, texts: tf.Tensor) -> dict[str, tf.Tensor]:
        """Ids of a dataset's texts (B,), or of one."""

        def encode(values: Any) -> Any:
            inputs = self._encode([text.decode() for text in np.atleast_1d(values).tolist()])
            return [inputs[name] for name in names]

        names = ("input_ids", "attention_mask")
        found: Any = tf.numpy_function(encode, [texts], [tf.int32, tf.int32])
        rows = texts.shape[0] if texts.shape.rank else 1
        for tensor in found:
            tensor.set_shape((rows, None))
        return dict(zip(names, found, strict=True))

    def _weighted_loss(self: Any, x: Any, y: Any, output: TFOPTOutput, weights: Any) -> tf.Tensor:
        """The mean loss of the labels, each with a factor."""
        logits: Any = output.logits
        if self.head == "causal_lm":
            labels, logits = self._labels(x, y)[:, 1:], logits[:, :-1]
        elif self.head == "sequence_classification" and y is not None and y.dtype.is_integer:
            labels = tf.reshape(y, (-1,))
        else:
            raise InputError("sample_weight: expected a loss given to compile(), received none")
        kept = labels != IGNORE_INDEX
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(
            tf.where(kept, labels, 0), tf.cast(logits, tf.float32)
        )
        factors = tf.cast(weights, each.dtype)
        if labels.shape.rank == 2:
            factors = factors[:, 1:] if factors.shape.rank == 2 else tf.reshape(factors, (-1, 1))
        count = tf.reduce_sum(tf.cast(kept, each.dtype))
        return tf.reduce_sum(tf.where(kept, each * factors, 0)) / count

    def _predictions(self, output: TFOPTOutput) -> Any:
        return output.logits

    def _labels(self, x: Any, y: Any) -> Any:
        """The labels, where they follow from the inputs if none are given."""
        return y

    def _loss(self, x: Any, y: Any, output: TFOPTOutput) -> tf.Tensor:
        raise InputError(f"{type(self).__name__} has no loss of its own; give one to compile()")


def _targets(x: Any, y: Any) -> Any:
    """The labels: y, or what a dict (y, or else the inputs) has of them."""
    source = x if y is None else y
    if not isinstance(source, Mapping):
        return y
    found = tuple(source[name] for name in LABELS if name in source)
    if y is not None and not found:
        names = ", ".join(map(str, source))
        raise InputError(f"y: expected a dict with {' or '.join(LABELS)}, received {names}")
    return found[0] if len(found) == 1 else found or None
