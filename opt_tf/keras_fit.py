"""Data and labels into Keras' compile, fit, evaluate and predict, and a model's output there."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from opt_core.compatibility import datasets, keras_hub
from opt_core.compatibility.datasets import LABELS
from opt_core.compatibility.sequences import PredictedSpans, Predictions
from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.inputs import Range
from opt_core.training.microbatches import IGNORE_INDEX
from opt_tf import _private
from opt_tf.decoder import TFOPTOutput
from opt_tf.inputs import as_integers, check_ranges

_INTERNAL_LOSSES = ("auto", "auto_with_warning", "passthrough")
"""Names of `transformers` for the loss that a model has itself."""


_KERAS_HUBS_RATE = 2e-5


class Fitted(keras.Model):
    """A Keras model whose output is a `TFOPTOutput` and that may have a loss of its own."""

    config: OPTConfig
    compiles_itself: bool = False
    """Whether fit and evaluate compile a model that has a preprocessor, as KerasHub's are."""

    def prepare_tf_dataset(
        self: Any,
        dataset: Any,
        batch_size: int = 8,
        shuffle: bool = True,
        tokenizer: Any = None,
        collate_fn: Callable[..., Any] | None = None,
        collate_fn_args: Mapping[str, Any] | None = None,
        drop_remainder: bool | None = None,
        prefetch: bool = True,
    ) -> tf.data.Dataset:
        """Batches of a dataset for `fit`: dicts of inputs, and their labels where there are some.

        Args:
            dataset: Rows that are mappings, by number: a list, or one of Hugging Face's `datasets`.
            batch_size: Rows of a batch.
            shuffle: In another order in each epoch.
            tokenizer: Its `padding_side` is taken, and its `pad_token_id`.
            collate_fn: Makes a batch of rows; None: shorter ones are padded.
            collate_fn_args: More arguments of it.
            drop_remainder: Leave out a last batch of fewer rows; None: where it shuffles.
            prefetch: Make batches ahead.

        Raises:
            DataError: No rows that are mappings, or none of the model's columns.
        """
        accepted = inspect.signature(self.call).parameters
        columns = datasets.columns_of(dataset, [*accepted, *datasets.LABELS])
        pad = getattr(tokenizer, "pad_token_id", None)
        pad = self.config.pad_token_id if pad is None else pad
        side = getattr(tokenizer, "padding_side", "right")
        drops = shuffle if drop_remainder is None else drop_remainder
        rng = np.random.default_rng() if shuffle else None

        def collate(rows: list[dict[str, Any]]) -> Any:
            if collate_fn is None:
                return datasets.stack_rows(rows, pad, side)
            return collate_fn(rows, **(collate_fn_args or {}))

        def batches(rows: int = batch_size, drops: bool = drops) -> Iterator[Any]:
            for batch in datasets.batches_of(dataset, columns, rows, collate, drops, rng):
                labels = {k: batch.pop(k) for k in datasets.LABELS if k in batch}
                alone = next(iter(labels.values())) if len(labels) == 1 else labels
                yield (batch, alone) if labels else batch

        like = next(batches(min(batch_size, len(dataset)), False))
        specs = keras.tree.map_structure(
            lambda x: tf.TensorSpec([None] * x.ndim, tf.as_dtype(x.dtype)), like
        )
        made = tf.data.Dataset.from_generator(batches, output_signature=specs)
        count = len(dataset) // batch_size if drops else -(-len(dataset) // batch_size)
        made = made.apply(tf.data.experimental.assert_cardinality(count))
        return made.prefetch(tf.data.AUTOTUNE) if prefetch else made

    def compile(
        self: Any,
        optimizer: Any = "rmsprop",
        loss: Any = None,
        *args: Any,
        sampler: Any = None,
        **options: Any,
    ) -> None:
        """Keras' compile; nothing of an earlier one stays.

        Args:
            optimizer: As there; "auto" is KerasHub's: Adam, 2e-5.
            loss: As there; None, or "passthrough" of `transformers`, for the model's own.
            *args: Keras' own.
            sampler: One of KerasHub's, or its name, such as "greedy": sets `generation_config`.
            **options: Keras' own.
        """
        if isinstance(optimizer, str) and optimizer == "auto":
            optimizer = keras.optimizers.Adam(_KERAS_HUBS_RATE)
        if options.get("weighted_metrics") == "auto":
            options["weighted_metrics"] = [keras.metrics.SparseCategoricalAccuracy()]
        if sampler is not None:
            settings = keras_hub.sampler_settings(sampler)
            self.generation_config = self.generation_config.replace(**settings)
        if isinstance(loss, str) and loss in _INTERNAL_LOSSES:
            loss = None
        if isinstance(loss, Mapping) and len(loss) == 1:  # by the output's name, of which one is
            (loss,) = loss.values()
        _private.forget_compilation(self)
        super().compile(optimizer, loss, *args, **options)

    def compile_from_config(self: Any, config: dict[str, Any]) -> None:
        """Compiles a loaded model as the saved one was."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.optimizer is not None and self.built:
            self.optimizer.build(self.trainable_variables)

    def compute_output_spec(self: Any, input_ids: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' `compute_output_spec`; several inputs may come as one dict."""
        if isinstance(input_ids, Mapping):
            found: Any = super().compute_output_spec(**keras_hub.renamed(input_ids), **options)
            is_hubs = keras_hub.are_keras_hubs(input_ids)
            return self._predictions(found) if is_hubs else found
        return super().compute_output_spec(input_ids, *args, **options)

    def fit(self, x: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' fit; ids that come as an array are checked first, as XLA could not refuse them.

        Texts, as a list, an array or a `tf.data.Dataset`, are turned into ids by `preprocessor`.
        """
        self._compile_as_kerashub()
        options = self._with_targets(x, args, options)
        return super().fit(self._checked(x), *args, **options)

    def evaluate(self, x: Any = None, *args: Any, **options: Any) -> Any:
        """Keras' evaluate, of ids checked as in `fit`."""
        self._compile_as_kerashub()
        options = self._with_targets(x, args, options)
        return super().evaluate(self._checked(x), *args, **options)

    def predict(self, x: Any, *args: Any, **options: Any) -> Any:
        """Keras' predict, of ids checked as in `fit`: the logits, which have that name too."""
        return self._named(super().predict(self._checked(x), *args, **options))

    def predict_on_batch(self, x: Any) -> Any:
        """Keras' predict_on_batch, as `predict`."""
        return self._named(super().predict_on_batch(self._checked(x)))

    def _compile_as_kerashub(self: Any) -> None:
        if not self.compiled and self.compiles_itself and self.preprocessor is not None:
            self.compile("auto", "auto", weighted_metrics="auto")

    def _named(self: Any, found: Any) -> Any:
        if self.head == "question_answering":
            return PredictedSpans(*found)
        return Predictions.of(found, self._field)

    @property
    def _field(self: Any) -> str:
        return "last_hidden_state" if self.head == "none" else "logits"

    def _as_output(self, found: Any) -> TFOPTOutput:
        """An output, also where a call returned its field alone."""
        return TFOPTOutput(**{self._field: found}) if tf.is_tensor(found) else found

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
        y_pred = self._as_output(y_pred)
        targets, are_next = _targets(x, y), keras_hub.are_keras_hubs(x)
        x = keras_hub.renamed(x)
        if are_next and targets is not None and not _private.has_compiled_loss(self):
            loss: Any = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            return loss(targets, self._predictions(y_pred), sample_weight)
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
        targets = self._labels(keras_hub.renamed(x), _targets(x, y))
        predictions = self._predictions(self._as_output(y_pred))
        results: Any = super().compute_metrics(x, targets, predictions, sample_weight)
        if isinstance(tf.distribute.get_strategy(), tf.distribute.MultiWorkerMirroredStrategy):
            # Keras 3.15 takes the mean over workers along an axis, which scalars do not have.
            results = keras.tree.map_structure(lambda result: tf.reshape(result, (1,)), results)
        return results

    def predict_step(self, data: Any) -> Any:
        """The logits: they are what Keras' predict returns."""
        return self._predictions(self._as_output(super().predict_step(data)))

    def _checked(self: Any, x: Any) -> Any:
        """The inputs, texts among them turned into ids, and ids checked."""
        is_dataset = isinstance(x, tf.data.Dataset)
        if is_dataset and getattr(x.element_spec, "dtype", None) == tf.string:
            return x.map(self._encode_in_graph)
        texts = None if is_dataset else keras_hub.texts_of(x)
        x = x if texts is None else self._encode(texts)[0]
        given = keras_hub.renamed(x)
        ids = given.get("input_ids") if isinstance(given, Mapping) else given
        if isinstance(ids, np.ndarray) or tf.is_tensor(ids):
            count = self.config.vocab_size
            tensor: Any = as_integers("input_ids", ids)
            check_ranges([Range("input_ids", tensor, 0, count - 1, f"vocab_size={count}")])
        return x

    def _with_targets(self, x: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """The options of a fit on texts, with the next tokens as y for a loss of the caller's."""
        texts = None if isinstance(x, tf.data.Dataset) else keras_hub.texts_of(x)
        is_given = bool(args) or options.get("y") is not None
        if texts is None or is_given or not _private.has_compiled_loss(self):
            return options
        _, y, weights = self._encode(texts)
        return {**options, "y": y, "sample_weight": weights}

    def _encode(self: Any, texts: list[str]) -> tuple[dict[str, Any], Any, Any]:
        """Inputs of texts, the next tokens, and their weights."""
        return keras_hub.encode_for_fit(self.preprocessor, texts, self.config)

    def _encode_in_graph(self, texts: tf.Tensor) -> Any:
        """Ids of a dataset's texts (B,), or of one."""

        def encode(values: Any) -> Any:
            made = self._encode([text.decode() for text in np.atleast_1d(values).tolist()])
            return [made[0]["input_ids"], made[0]["attention_mask"], *made[1:]]

        found: Any = tf.numpy_function(encode, [texts], [tf.int32] * 4)
        rows = texts.shape[0] if texts.shape.rank else 1
        for tensor in found:
            tensor.set_shape((rows, None))
        ids, mask, y, weights = found
        inputs = {"input_ids": ids, "attention_mask": mask}
        return (inputs, y, weights) if _private.has_compiled_loss(self) else inputs

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
    names = LABELS if y is None else (*LABELS, "logits")  # a loss may be named as its output is
    found = tuple(source[name] for name in names if name in source)
    if y is not None and not found:
        names = ", ".join(map(str, source))
        raise InputError(f"y: expected a dict with {' or '.join(LABELS)}, received {names}")
    return found[0] if len(found) == 1 else found or None
