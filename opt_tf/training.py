"""Training: the optimizer, one step, and the loop around it."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from opt_core.errors import InputError
from opt_core.params import param_specs
from opt_core.training import microbatches, steps
from opt_core.training.config import TrainConfig
from opt_core.training.labels import class_count
from opt_tf import _private, lora, losses, sharding
from opt_tf.checkpoint import locate
from opt_tf.compilation import compiled
from opt_tf.inputs import check_inputs

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTPreTrainedModel


@keras.saving.register_keras_serializable("opt_tf")
class _AdamW(keras.optimizers.AdamW):
    """Keras' AdamW, but epsilon is added where PyTorch adds it, and only matrices decay."""

    def __init__(self, name: str = "adamw", **options: Any):
        super().__init__(name=name, **options)
        self.exclude_from_weight_decay(var_names=[r"(^|/)(bias|gamma|beta)(/replica_\d+)?(:0)?$"])

    def build(self, variables: Any) -> None:
        """Makes the running means; Keras may call it again."""
        super().build(variables)
        self.trained = lambda: variables  # not a list, which Keras would take for its own

    def apply(self, grads: Any, trainable_variables: Any = None) -> None:
        """Applies gradients, clipped over all replicas together; Keras clips each one's alone."""
        replica = tf.distribute.get_replica_context()
        if self.global_clipnorm and replica is not None and replica.num_replicas_in_sync > 1:
            sums = replica.all_reduce(tf.distribute.ReduceOp.SUM, grads)
            clipped, _ = tf.clip_by_global_norm(sums, self.global_clipnorm)
            grads = [gradient / replica.num_replicas_in_sync for gradient in clipped]
        super().apply(grads, trainable_variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable: mean / (sqrt(mean of squares) + epsilon), both bias-corrected."""
        dtype, (mean, square) = variable.dtype, _private.moments(self, variable)
        done: Any = self.iterations
        steps = tf.cast(done + 1, dtype)
        self.assign_add(mean, (gradient - mean) * (1 - self.beta_1))
        self.assign_add(square, (gradient * gradient - square) * (1 - self.beta_2))
        scale = tf.cast(learning_rate, dtype) / (1 - tf.cast(self.beta_1, dtype) ** steps)
        root = tf.sqrt(square / (1 - tf.cast(self.beta_2, dtype) ** steps))
        self.assign_sub(variable, scale * mean / (root + self.epsilon))


def make_optimizer(model: "TFOPTPreTrainedModel", config: TrainConfig) -> keras.optimizers.AdamW:
    """Makes a model ready for a training and returns its AdamW.

    Adapters are put on it where the configuration asks for them; what is not trained gets no
    gradient. Weight decay applies to the parameters that `ParamSpec.decays`. The optimizer clips
    gradients to `max_grad_norm` itself, and can be given to Keras' `compile` too.
    """
    trained = steps.prepare_model(model, config, lora)
    for spec in param_specs(model.config, model.head):
        locate(model, spec).trainable = False
    for spec in trained:
        locate(model, spec).trainable = True
    optimizer = _AdamW(
        learning_rate=config.learning_rate,
        beta_1=config.adam_beta1,
        beta_2=config.adam_beta2,
        epsilon=config.adam_epsilon,
        weight_decay=config.weight_decay,
        global_clipnorm=config.max_grad_norm,
    )
    optimizer.build(model.trainable_variables)
    return optimizer


def train_step(
    model: "TFOPTPreTrainedModel",
    optimizer: keras.optimizers.Optimizer,
    batch: Any,
    config: TrainConfig,
    step: int,
) -> tuple[float, float]:
    """One optimizer step on one batch, with dropout.

    What is dropped depends on the seed and the step's number alone. If the loss or the gradient is
    not finite, the step is skipped.

    Args:
        model: The model to train, in place; its policy decides what it is computed in.
        optimizer: From `make_optimizer`.
        batch: (B, T) ids, which are the labels too, or a dict of the model's inputs and labels. In
            the scope of `opt_tf.sharding.make_mesh` each device computes a part of its rows.
        config: Learning rate, accumulation and the rest.
        step: Step number, from 0.

    Returns:
        The loss (in nats per token), and the gradient's norm before clipping.
    """
    optimizer.learning_rate = config.learning_rate_at(step)
    if tf.distribute.get_strategy().num_replicas_in_sync > 1:
        return _spread_step(model, optimizer, batch, config, step)
    seeds, count = model.get_decoder().dropout_seeds.state, config.gradient_accumulation_steps
    smoothing = config.label_smoothing
    loss: Any = None
    norm = gradients = loss
    parts = microbatches.split_batch(_arrays(batch), count, model.head == "causal_lm")
    for number, (part, share) in enumerate(parts):
        inputs = _inputs(model, part)
        seeds.assign(tf.constant([config.dropout_seed(step, number), 0], seeds.dtype))
        if count == 1:
            loss, norm = compiled(model, _update, optimizer, smoothing)(inputs)
            continue
        new = compiled(model, _gradients, smoothing)(inputs)
        new = [value * share for value in (new[0], *new[1])]
        if gradients is not None:
            new = [a + b for a, b in zip(gradients, new, strict=True)]
        gradients = new
    if gradients is not None:
        loss, norm = gradients[0], compiled(model, _apply, optimizer)(gradients[0], gradients[1:])
    return float(loss), float(norm)


def compute_loss(
    model: "TFOPTPreTrainedModel",
    batch: Any,
    label_smoothing: float = 0.0,
    **options: Any,
) -> tf.Tensor:
    """The mean loss of one batch.

    Args:
        model: With a head.
        batch: As for `train_step`.
        label_smoothing: Share of the likelihood that is asked for everywhere.
        **options: `training`, as the model takes it.
    """
    named = microbatches.as_batch(batch)
    return steps.batch_loss(model, named, losses, _head, label_smoothing, **options)


def evaluate(model: "TFOPTPreTrainedModel", batches: Iterable[Any]) -> float:
    """Mean loss (in nats per predicted token) over some batches, without dropout."""
    return steps.mean_loss(
        map(_arrays, batches), model.head == "causal_lm",
        lambda batch: compiled(model, _loss)(_inputs(model, batch)),
    )  # fmt: skip


def fit(
    model: "TFOPTPreTrainedModel",
    batches: Iterator[Any],
    config: TrainConfig,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Trains a model for `config.max_steps` steps.

    Args:
        model: The model to train, in place.
        batches: (B, T) ids each, or dicts of inputs and labels.
        config: How to train.
        report: Called after each step with its number and loss.
    """
    optimizer = make_optimizer(model, config)
    steps.take_steps(model, optimizer, batches, config, train_step, report)


def _gradients(
    model: "TFOPTPreTrainedModel", smoothing: float, inputs: dict[str, tf.Tensor]
) -> tuple[Any, Any]:
    with tf.GradientTape() as tape:
        loss = steps.batch_loss(model, inputs, losses, _head, smoothing, training=True)
    return loss, tape.gradient(loss, model.trainable_variables)


def _apply(
    model: "TFOPTPreTrainedModel", optimizer: keras.optimizers.Optimizer, loss: Any, gradients: Any
) -> Any:
    """Moves the weights, unless that would spoil them; returns the gradient's norm."""
    norm: Any = tf.linalg.global_norm(gradients)

    def move() -> tf.Tensor:
        optimizer.apply(gradients, model.trainable_variables)
        return tf.constant(True)

    is_sound = tf.math.is_finite(loss) & tf.math.is_finite(norm)
    tf.cond(is_sound, move, lambda: tf.constant(False))
    return norm


def _update(
    model: "TFOPTPreTrainedModel",
    optimizer: keras.optimizers.Optimizer,
    smoothing: float,
    inputs: dict[str, tf.Tensor],
) -> tuple[Any, Any]:
    loss, gradients = _gradients(model, smoothing, inputs)
    return loss, _apply(model, optimizer, loss, gradients)


def _spread_step(
    model: "TFOPTPreTrainedModel",
    optimizer: keras.optimizers.Optimizer,
    batch: Any,
    config: TrainConfig,
    step: int,
) -> tuple[float, float]:
    """`train_step` on several devices, each of which has its rows and a copy of the model."""
    named, is_text = _arrays(batch), model.head == "causal_lm"
    ways, count = (
        tf.distribute.get_strategy().num_replicas_in_sync,
        (config.gradient_accumulation_steps),
    )
    rows = len(named["input_ids"])
    if rows % (ways * count):
        raise InputError(f"batch: {rows} rows cannot be shared by {ways} devices in {count} parts")
    seeds, totals = model.get_decoder().dropout_seeds.state, None
    for number, (part, share) in enumerate(microbatches.split_batch(named, count, is_text)):
        pieces = list(microbatches.split_batch(part, ways, is_text))
        if len(pieces) < ways:
            raise InputError("batch: expected labels on every device, received none on one")
        inputs = [_inputs(model, piece) for piece, _ in pieces]
        spread = {k: sharding.spread_values([each[k] for each in inputs]) for k in inputs[0]}
        shares = [tf.constant(share * own, tf.float32) for _, own in pieces]
        seeds.assign(tf.constant([config.dropout_seed(step, number), 0], seeds.dtype))
        run = _spread(model, _replica_gradients, config.label_smoothing)
        new = run(spread, sharding.spread_values(shares))
        totals = new if totals is None else [a + b for a, b in zip(totals, new, strict=True)]
    assert totals is not None
    loss, norm = float(totals[0]), float(tf.linalg.global_norm(totals[1:]))
    if np.isfinite(loss) and np.isfinite(norm):
        _spread(model, _replica_apply, optimizer)(totals[1:])
    return loss, norm


def _spread(model: "TFOPTPreTrainedModel", program: Callable[..., Any], *fixed: Any) -> Any:
    """A program that runs on every device of the present strategy, its results added up."""
    strategy = tf.distribute.get_strategy()
    key = (program, model.config.snapshot(), strategy, *fixed)
    if key not in model.programs:

        def run(*inputs: Any) -> Any:
            return sharding.sum_replicas(
                strategy.run(partial(program, model, *fixed), args=inputs) or []
            )

        model.programs[key] = tf.function(run, autograph=False)
    return model.programs[key]


def _replica_gradients(
    model: "TFOPTPreTrainedModel", smoothing: float, inputs: dict[str, tf.Tensor], share: Any
) -> list[tf.Tensor]:
    """One device's part of the loss, and of each gradient."""
    loss, gradients = _gradients(model, smoothing, inputs)
    return [tf.convert_to_tensor(value) * share for value in (loss, *gradients)]


def _replica_apply(
    model: "TFOPTPreTrainedModel", optimizer: keras.optimizers.Optimizer, gradients: Any
) -> None:
    """Moves one device's copy of the weights; the optimizer adds up what devices give it."""
    context: Any = tf.distribute.get_replica_context()
    shares = [gradient / context.num_replicas_in_sync for gradient in gradients]
    optimizer.apply(shares, model.trainable_variables)


def _loss(model: "TFOPTPreTrainedModel", inputs: dict[str, tf.Tensor]) -> tf.Tensor:
    return steps.batch_loss(model, inputs, losses, _head, training=False)


def _head(model: Any) -> tf.Tensor | None:
    """Weight of the language-model head (V, P), where `losses.chunked_causal_lm` can use it."""
    if model.lm_head is not None:
        return tf.convert_to_tensor(model.lm_head.weight)
    return tf.convert_to_tensor(model.get_decoder().embed_tokens.embeddings)


def _arrays(batch: Any) -> microbatches.Batch:
    """The batch on the host, where it can be cut and counted."""
    return {name: np.asarray(value) for name, value in microbatches.as_batch(batch).items()}


def _inputs(model: "TFOPTPreTrainedModel", batch: microbatches.Batch) -> dict[str, tf.Tensor]:
    """The batch as tensors, checked while its values can still be looked at."""
    ids, mask, *_ = check_inputs(
        model.config, model.compute_dtype, batch["input_ids"], batch.get("attention_mask"),
        None, None, None,
    )  # fmt: skip
    inputs: dict[str, Any] = {k: tf.convert_to_tensor(v) for k, v in batch.items()}
    inputs |= {"input_ids": ids, "attention_mask": mask}
    labels = inputs.get("labels")
    if labels is not None and labels.dtype.is_integer:
        classes = class_count(model.config, model.head)
        inputs["labels"] = losses.check_labels("labels", labels, tuple(labels.shape), classes)
    return {name: value for name, value in inputs.items() if value is not None}
