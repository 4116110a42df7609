"""Training: the optimizer, one compiled step, and the loop around it."""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import optax
from flax import nnx
from jax import Array

from opt_core.errors import InputError
from opt_core.params import param_specs
from opt_core.training import TrainConfig
from opt_flax.checkpoint import path_of
from opt_flax.inputs import check_inputs
from opt_flax.parallel import place, spread_rows
from opt_flax.quantization import refuse

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM, FlaxOPTPreTrainedModel


def make_optimizer(model: "FlaxOPTPreTrainedModel", config: TrainConfig) -> nnx.Optimizer[Any]:
    """AdamW with weight decay on the parameters that `ParamSpec.decays`.

    Its `update(model, gradients, learning_rate=...)` clips the gradients first.
    """
    refuse(model, "make_optimizer")
    specs = param_specs(model.config, model.head)
    decayed = {path_of(model, spec)[0] for spec in specs if spec.decays}

    def decays(params: Any) -> Any:
        return nnx.map_state(lambda path, _: tuple(path) in decayed, params)

    transform = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.scale_by_adam(config.adam_beta1, config.adam_beta2, config.adam_epsilon),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), _descend),
    )
    return nnx.Optimizer(model, transform, wrt=nnx.Param)


def train_step(
    model: "FlaxOPTForCausalLM",
    optimizer: nnx.Optimizer[Any],
    batch: Any,
    config: TrainConfig,
    step: int,
) -> tuple[float, float]:
    """One optimizer step on one batch.

    Args:
        model: In training mode where dropout is wanted.
        optimizer: From `make_optimizer`.
        batch: (B, T) ids, which are the labels too: the whole batch, on every host, or an array
            that is spread over the model's mesh already.
        config: Learning rate and gradient clipping.
        step: Step number, from 0.

    Returns:
        The loss in nats per token, and the gradient's norm before clipping.
    """
    ids = _ids(model, batch)
    graph, state = nnx.split((model, optimizer))
    state = place(state, model.mesh)
    rate = np.float32(config.learning_rate_at(step))
    state, loss, norm = _step(graph, state, ids, rate)
    nnx.update((model, optimizer), state)
    return float(loss), float(norm)


def evaluate(model: "FlaxOPTForCausalLM", batches: Iterable[Any]) -> float:
    """Mean loss in nats per predicted token over some batches of equal rows, without dropout."""
    graph, state = nnx.split(model)
    total, count = 0.0, 0
    for batch in batches:
        predicted = batch.shape[0] * (batch.shape[1] - 1)
        total += float(_loss(graph, state, _ids(model, batch))) * predicted
        count += predicted
    if count == 0:
        raise InputError("evaluate: expected batches with at least two tokens a row, received none")
    return total / count


def fit(
    model: "FlaxOPTForCausalLM",
    batches: Iterator[Any],
    config: TrainConfig,
    report: Callable[[int, float], None] | None = None,
) -> None:
    """Trains a model for `config.max_steps` steps and leaves it in evaluation mode.

    Args:
        model: The model to train, in place.
        batches: (B, T) ids each.
        config: How to train.
        report: Called after each step with its number and loss.
    """
    model.get_decoder().rngs = nnx.Rngs(dropout=config.seed)
    optimizer = make_optimizer(model, config)
    model.train()
    try:
        for step in range(config.max_steps):
            batch = next(batches, None)
            if batch is None:
                raise InputError(f"fit: the batches ended at step {step} of {config.max_steps}")
            loss, _ = train_step(model, optimizer, batch, config, step)
            if report is not None:
                report(step, loss)
    finally:
        model.eval()


def _ids(model: "FlaxOPTForCausalLM", batch: Any) -> Array:
    """The batch, checked while its values can still be looked at."""
    ids, *_ = check_inputs(model.config, model.dtype, batch, None, None, None, None)
    assert ids is not None
    return spread_rows(ids, model.mesh)


def _descend(updates: Any, state: Any, params: Any = None, **given: Any) -> Any:
    return jax.tree.map(lambda update: update * -given["learning_rate"], updates), state


@partial(jax.jit, static_argnames="graph", donate_argnames="state")
def _step(graph: Any, state: Any, ids: Array, rate: Array) -> tuple[Any, Array, Array]:
    model, optimizer = nnx.merge(graph, state)
    wrt = nnx.DiffState(0, nnx.Param)
    loss, gradients = nnx.value_and_grad(lambda m: m(ids, labels=ids).loss, argnums=wrt)(model)
    norm = optax.tree.norm(gradients)
    optimizer.update(model, gradients, learning_rate=rate)
    return nnx.state((model, optimizer)), loss, norm


@partial(jax.jit, static_argnames="graph")
def _loss(graph: Any, state: Any, ids: Array) -> Array:
    return nnx.merge(graph, state)(ids, labels=ids, deterministic=True).loss
