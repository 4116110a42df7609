"""Training: the optimizer, one step, and the loop around it."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from opt_core.errors import InputError
from opt_core.training import TrainConfig
from opt_tf.inputs import check_inputs
from opt_tf.quantization import refuse

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM, TFOPTPreTrainedModel


@keras.saving.register_keras_serializable("opt_tf")
class _AdamW(keras.optimizers.AdamW):
    """Keras' AdamW, but epsilon is added where PyTorch adds it, and only matrices decay."""

    def __init__(self, name: str = "adamw", **options: Any):
        super().__init__(name=name, **options)
        self.exclude_from_weight_decay(var_names=[r"(^|/)(bias|gamma|beta)(/replica_\d+)?(:0)?$"])

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
        index, dtype = self._get_variable_index(variable), variable.dtype
        mean, square = self._momentums[index], self._velocities[index]
        done: Any = self.iterations
        steps = tf.cast(done + 1, dtype)
        self.assign_add(mean, (gradient - mean) * (1 - self.beta_1))
        self.assign_add(square, (gradient * gradient - square) * (1 - self.beta_2))
        scale = tf.cast(learning_rate, dtype) / (1 - tf.cast(self.beta_1, dtype) ** steps)
        root = tf.sqrt(square / (1 - tf.cast(self.beta_2, dtype) ** steps))
        self.assign_sub(variable, scale * mean / (root + self.epsilon))


def make_optimizer(model: "TFOPTPreTrainedModel", config: TrainConfig) -> keras.optimizers.AdamW:
    """AdamW with weight decay on the parameters that `ParamSpec.decays`.

    It clips gradients to `max_grad_norm` itself, and can be given to Keras' `compile` too.
    """
    refuse(model, "make_optimizer")
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
    model: "TFOPTForCausalLM",
    optimizer: keras.optimizers.Optimizer,
    batch: Any,
    config: TrainConfig,
    step: int,
) -> tuple[float, float]:
    """One optimizer step on one batch, with dropout.

    Args:
        model: The model to train, in place.
        optimizer: From `make_optimizer`.
        batch: (B, T) ids, which are the labels too.
        config: Learning rate.
        step: Step number, from 0.

    Returns:
        The loss in nats per token, and the gradient's norm before clipping.
    """
    optimizer.learning_rate = config.learning_rate_at(step)
    loss, norm = _compiled(model, _update, optimizer)(_ids(model, batch))
    return float(loss), float(norm)


def evaluate(model: "TFOPTForCausalLM", batches: Iterable[Any]) -> float:
    """Mean loss in nats per predicted token over some batches of equal rows, without dropout."""
    total, count = 0.0, 0
    for batch in batches:
        predicted = batch.shape[0] * (batch.shape[1] - 1)
        total += float(_compiled(model, _loss)(_ids(model, batch))) * predicted
        count += predicted
    if count == 0:
        raise InputError("evaluate: expected batches with at least two tokens a row, received none")
    return total / count


def fit(
    model: "TFOPTForCausalLM",
    batches: Iterator[Any],
    config: TrainConfig,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Trains a model for `config.max_steps` steps.

    Args:
        model: The model to train, in place.
        batches: (B, T) ids each.
        config: How to train.
        report: Called after each step with its number and loss.
    """
    seeds = model.get_decoder().dropout_seeds.state
    seeds.assign(tf.constant([config.seed, 0], seeds.dtype))
    optimizer = make_optimizer(model, config)
    for step in range(config.max_steps):
        batch = next(batches, None)
        if batch is None:
            raise InputError(f"fit: the batches ended at step {step} of {config.max_steps}")
        loss, _ = train_step(model, optimizer, batch, config, step)
        if report is not None:
            report(step, loss)


def _update(
    model: "TFOPTForCausalLM", optimizer: keras.optimizers.Optimizer, ids: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    variables = model.trainable_variables
    with tf.GradientTape() as tape:
        loss: Any = model(ids, labels=ids, training=True).loss
    gradients = tape.gradient(loss, variables)
    optimizer.apply(gradients, variables)
    return loss, tf.linalg.global_norm(gradients)


def _loss(model: "TFOPTForCausalLM", ids: tf.Tensor) -> tf.Tensor:
    loss: Any = model(ids, labels=ids, training=False).loss
    return loss


def _compiled(model: "TFOPTForCausalLM", program: Callable[..., Any], *fixed: Any) -> Any:
    key = (program, *fixed)
    if key not in model.programs:
        run = partial(program, model, *fixed)
        model.programs[key] = tf.function(run, jit_compile=True, autograph=False)
    return model.programs[key]


def _ids(model: "TFOPTForCausalLM", batch: Any) -> tf.Tensor:
    ids = check_inputs(model.config, model.compute_dtype, batch, None, None, None, None)[0]
    assert ids is not None
    return ids
