"""Training: the optimizer, one compiled step, and the loop around it."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import Array

from opt_core.params import param_specs
from opt_core.training import microbatches, steps
from opt_core.training.config import TrainConfig
from opt_core.training.labels import class_count
from opt_flax import lora, losses
from opt_flax.checkpoint import parameter_path
from opt_flax.inputs import check_inputs
from opt_flax.sharding import place, shard_batch

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTPreTrainedModel


def make_optimizer(model: "FlaxOPTPreTrainedModel", config: TrainConfig) -> nnx.Optimizer[Any]:
    """Makes a model ready for a training and returns its AdamW.

    Adapters are put on it where the configuration asks for them; what is not trained gets no
    gradient. Weight decay applies to the parameters that `ParamSpec.decays`. The optimizer's
    `update(model, gradients, learning_rate=...)` clips the gradients first.
    """
    specs = steps.prepare_model(model, config, lora)
    decayed = {parameter_path(model, spec)[0] for spec in specs if spec.decays}

    def decays(params: Any) -> Any:
        return nnx.map_state(lambda path, _: tuple(path) in decayed, params)

    transform = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), _descend),
    )
    trained: Any = nnx.Param
    if len(specs) < len(param_specs(model.config, model.head)) or config.lora_rank:
        trained = _Trained(frozenset(parameter_path(model, spec)[0] for spec in specs))
    return nnx.Optimizer(model, transform, wrt=trained)


def train_step(
    model: "FlaxOPTPreTrainedModel",
    optimizer: nnx.Optimizer[Any],
    batch: Any,
    config: TrainConfig,
    step: int,
) -> tuple[float, float]:
    """One optimizer step on one batch.

    What is dropped depends on the seed and the step's number alone. If the loss or the gradient is
    not finite, the step is skipped.

    Args:
        model: In training mode where dropout is wanted.
        optimizer: From `make_optimizer`.
        batch: (B, T) ids, which are the labels too, or a dict of the model's inputs and labels:
            the whole batch, on every host, or arrays that are spread over the model's mesh already.
        config: Learning rate, clipping and the rest.
        step: Step number, from 0.

    Returns:
        The loss (in nats per token), and the gradient's norm before clipping.
    """
    graph, state = nnx.split((model, optimizer))
    state = place(state, model.mesh)
    rate = np.float32(config.learning_rate_at(step))
    how = (config.label_smoothing, config.precision == "bfloat16")
    count = config.gradient_accumulation_steps
    loss: Any = None
    norm = gradients = loss
    named = microbatches.as_batch(batch)
    for number, (part, share) in enumerate(
        microbatches.split_batch(named, count, model.head == "causal_lm")
    ):
        inputs, seed = _inputs(model, part), np.uint32(config.dropout_seed(step, number))
        if count == 1:
            state, loss, norm = _step(graph, state, inputs, seed, rate, how)
        else:
            loss, gradients = _add(
                graph, state, inputs, seed, np.float32(share), loss, gradients, how
            )
    if count > 1:
        state, loss, norm = _apply(graph, state, loss, gradients, rate)
    nnx.update((model, optimizer), state)
    return float(loss), float(norm)


def compute_loss(
    model: "FlaxOPTPreTrainedModel",
    batch: Any,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Array:
    """The mean loss of one batch.

    Args:
        model: With a head.
        batch: As for `train_step`.
        label_smoothing: Share of the likelihood that is asked for everywhere.
        **options: `deterministic` and `rngs`, as the model takes them.
    """
    named = microbatches.as_batch(batch)
    return steps.batch_loss(model, named, losses, _head, label_smoothing, **options)


def evaluate(model: "FlaxOPTPreTrainedModel", batches: Iterable[Any]) -> float:
    """Mean loss (in nats per predicted token) over some batches, without dropout."""
    graph, state = nnx.split(model)
    named = map(microbatches.as_batch, batches)
    return steps.mean_loss(
        named, model.head == "causal_lm", lambda b: _loss(graph, state, _inputs(model, b))
    )


def fit(
    model: "FlaxOPTPreTrainedModel",
    batches: Iterator[Any],
    config: TrainConfig,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Trains a model for `config.max_steps` steps and leaves it in evaluation mode.

    Args:
        model: The model to train, in place.
        batches: (B, T) ids each, or dicts of inputs and labels.
        config: How to train.
        report: Called after each step with its number and loss.
    """
    optimizer = make_optimizer(model, config)
    model.train()
    try:
        steps.take_steps(model, optimizer, batches, config, train_step, report)
    finally:
        model.eval()


@dataclass(frozen=True)
class _Trained:
    """The trained parameters where not all are trained, as a filter of NNX."""

    paths: frozenset[tuple[str | int, ...]]

    def __call__(self, path: Any, value: Any) -> bool:
        return tuple(path) in self.paths


def _inputs(model: "FlaxOPTPreTrainedModel", batch: microbatches.Batch) -> dict[str, Array]:
    """The batch, checked while its values can still be looked at."""
    ids, mask, *_ = check_inputs(
        model.config, model.dtype, batch["input_ids"], batch.get("attention_mask"), None, None, None
    )
    inputs: dict[str, Any] = batch | {"input_ids": ids, "attention_mask": mask}
    labels = inputs.get("labels")
    if labels is not None and np.issubdtype(labels.dtype, np.integer):
        classes = class_count(model.config, model.head)
        inputs["labels"] = losses.check_labels("labels", labels, tuple(labels.shape), classes)
    return {
        name: shard_batch(value, model.mesh) for name, value in inputs.items() if value is not None
    }


def _head(model: Any) -> Array | None:
    """Weight of the language-model head (V, P), where `losses.chunked_causal_lm` can use it.

    It cannot where the weight is quantised, nor on a mesh: chunks of rows would not stay spread.
    """
    if model.mesh is not None:
        return None
    if model.lm_head is not None:
        return model.lm_head.weight[...]
    return model.get_decoder().embed_tokens.embedding[...]


def _descend(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
    return jax.tree.map(lambda update: update * -given["learning_rate"], updates), state


def _gradients(
    model: Any, optimizer: Any, inputs: Any, seed: Array, how: tuple[float, bool]
) -> tuple[Array, Any]:
    smoothing, is_mixed = how

    def loss(model: Any) -> Array:
        if is_mixed:  # products in bfloat16; weights, norms and losses stay as they are
            graph, state = nnx.split(model)
            model = nnx.merge(graph, jax.tree.map(_narrow, state))
        rngs = nnx.Rngs(dropout=jax.random.key(seed))
        return steps.batch_loss(model, inputs, losses, _head, smoothing, rngs=rngs)

    return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, optimizer.wrt))(model)


def _narrow(values: Array) -> Array:
    return values.astype(jnp.bfloat16) if values.dtype == jnp.float32 else values


def _update(
    model: Any, optimizer: Any, loss: Array, gradients: Any, rate: Array
) -> tuple[Any, Array, Array]:
    """Moves the weights, unless that would spoil them."""
    norm = optax.tree.norm(gradients)
    # A copy of the variables, which the update changes; not of their values.
    before = jax.tree.map(lambda values: values, nnx.state((model, optimizer)))
    optimizer.update(model, gradients, learning_rate=rate)
    # Number by number, in the buffers there are. XLA's GPU compiler holds what a condition returns
    # beside what it was given, and on a mesh whole on every device.
    is_sound = jnp.isfinite(loss) & jnp.isfinite(norm)
    choose = partial(jnp.where, is_sound)
    return jax.tree.map(choose, nnx.state((model, optimizer)), before), loss, norm


@partial(jax.jit, static_argnames=("graph", "how"), donate_argnames="state")
def _step(graph: Any, state: Any, inputs: Any, seed: Array, rate: Array, how: Any) -> Any:
    model, optimizer = nnx.merge(graph, state)
    loss, gradients = _gradients(model, optimizer, inputs, seed, how)
    return _update(model, optimizer, loss, gradients, rate)


@partial(jax.jit, static_argnames=("graph", "how"), donate_argnames="gradients")
def _add(
    graph: Any, state: Any, inputs: Any, seed: Array, share: Array, loss: Any, gradients: Any,
    how: Any,
) -> Any:  # fmt: skip
    """Adds one part's loss and gradient to those of the parts before it."""
    model, optimizer = nnx.merge(graph, state)
    new = jax.tree.map(lambda g: g * share, _gradients(model, optimizer, inputs, seed, how))
    return new if loss is None else jax.tree.map(jnp.add, (loss, gradients), new)


@partial(jax.jit, static_argnames="graph", donate_argnames="state")
def _apply(graph: Any, state: Any, loss: Array, gradients: Any, rate: Array) -> Any:
    model, optimizer = nnx.merge(graph, state)
    return _update(model, optimizer, loss, gradients, rate)


@partial(jax.jit, static_argnames="graph")
def _loss(graph: Any, state: Any, inputs: Any) -> Array:
    model = nnx.merge(graph, state)
    return steps.batch_loss(model, inputs, losses, _head, deterministic=True)
