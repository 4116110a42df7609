"""Training: the optimizer, one step, and the loop around it."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW

from opt_core import mesh as rules
from opt_core.training import microbatches, steps
from opt_core.training.config import TrainConfig
from opt_torch import distribution, lora, losses, sharding
from opt_torch.checkpoint import locate

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel


def make_optimizer(model: "OPTPreTrainedModel", config: TrainConfig) -> AdamW:
    """Makes a model ready for a training and returns its AdamW.

    Adapters are put on it where the configuration asks for them; what is not trained gets no
    gradient. Weight decay applies to the parameters that `ParamSpec.decays`.
    """
    if model.mesh is not None:
        distribution.check_trainable(model)
    trained = steps.prepare_model(model, config, lora)
    distribution.settle(model)
    model.requires_grad_(False)
    groups: dict[Any, list[Any]] = {(True, None): [], (False, None): []}
    for spec in trained:
        parameter: Any = locate(model, spec).requires_grad_(True)
        # One group for each mesh that DTensors lie on: AdamW computes a group at once.
        where = parameter.device_mesh if sharding.is_spread(parameter) else None
        groups.setdefault((spec.decays, where), []).append(parameter)
    return AdamW(
        [
            {"params": parameters, "weight_decay": config.weight_decay if decays else 0.0}
            for (decays, where), parameters in groups.items()
            if parameters or where is None
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def train_step(
    model: "OPTPreTrainedModel", optimizer: AdamW, batch: Any, config: TrainConfig, step: int
) -> tuple[float, float]:
    """One optimizer step on one batch.

    What is dropped depends on the seed and the step's number alone. If the loss or the gradient is
    not finite, the step is skipped.

    Args:
        model: In training mode where dropout is wanted.
        optimizer: From `make_optimizer`.
        batch: (B, T) ids, which are the labels too, or a dict of the model's inputs and labels. On
            a mesh the whole batch, on every process, or its own rows (`sharding.spread_rows`).
        config: Learning rate, clipping and the rest.
        step: Step number, from 0.

    Returns:
        The loss (in nats per token), and the gradient's norm before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    device, mesh, is_text = model.device, model.mesh, model.head == "causal_lm"
    total = torch.zeros((), device=device)
    named, count = microbatches.as_batch(batch), config.gradient_accumulation_steps
    rows = None if mesh is None else sharding.own_rows(named, mesh, is_text)
    if rows is None:
        parts = microbatches.split_batch(named, count, is_text)
    else:
        parts = microbatches.split_batch(rows.batch, count, is_text, rows.total)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, (part, share) in enumerate(parts):
            draw = number if rows is None else number * rows.ways + rows.index
            torch.manual_seed(config.dropout_seed(step, draw))
            with torch.autocast(device.type, torch.bfloat16, config.precision == "bfloat16"):
                loss = _share(model, part, share, rows, config.label_smoothing)
            loss.backward()
            total += loss.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    if mesh is None:
        norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
    else:
        norm = distribution.clip_gradients(trained, config.max_grad_norm, mesh)
        total = sharding.sum_rows(total, mesh) / rules.row_ways(sharding.sizes_of(mesh))
    if math.isfinite(norm) and math.isfinite(total.item()):
        optimizer.step()
    optimizer.zero_grad()
    return total.item(), norm


def compute_loss(
    model: "OPTPreTrainedModel",
    batch: Any,
    label_smoothing: float = 0.0,
    **options: Any,
) -> Tensor:
    """The mean loss of one batch.

    Args:
        model: With a head.
        batch: As for `train_step`.
        label_smoothing: Share of the likelihood that is asked for everywhere.
        **options: More of what the model takes.
    """
    named = microbatches.as_batch(batch)
    return steps.batch_loss(model, named, losses, _head, label_smoothing, **options)


@torch.no_grad()
def evaluate(model: "OPTPreTrainedModel", batches: Iterable[Any]) -> float:
    """Mean loss (in nats per predicted token) over some batches, without dropout."""
    was_training = model.training
    model.eval()
    named = map(microbatches.as_batch, batches)
    try:
        return steps.mean_loss(named, model.head == "causal_lm", lambda b: _mean(model, b))
    finally:
        model.train(was_training)


def fit(
    model: "OPTPreTrainedModel",
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


def _head(model: Any) -> Tensor | None:
    """Weight of the language-model head (V, P), where `losses.chunked_causal_lm` can use it.

    It cannot on a mesh, where the weight is not whole, nor ready before the model is called.
    """
    return model.lm_head.weight if model.mesh is None else None


def _share(
    model: "OPTPreTrainedModel",
    part: microbatches.Batch,
    share: float,
    rows: sharding.OwnRows | None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of a part of a batch, as much as the part has in the batch's mean loss.

    On a mesh `ways` times that: gradients become the mean over the processes.

    Args:
        model: With a head.
        part: Some of the rows.
        share: Their share of the predictions.
        rows: The rows of this process that they are of; None: there is one process.
        label_smoothing: Share of the likelihood that is asked for everywhere.
    """
    if rows is None:
        return share * steps.batch_loss(model, part, losses, _head, label_smoothing)
    if model.head != "causal_lm":
        mean = steps.batch_loss(model, part, losses, _head, label_smoothing)
        return rows.ways * share * mean
    # The sum, not the mean: a process may have rows without a label.
    items = rows.total / rows.ways
    return steps.batch_loss(model, part, losses, _head, label_smoothing, items)


def _mean(model: "OPTPreTrainedModel", batch: microbatches.Batch) -> Tensor:
    """The mean loss of one batch, each process computing its own rows."""
    mesh, is_text = model.mesh, model.head == "causal_lm"
    if mesh is None:
        return steps.batch_loss(model, batch, losses, _head)
    rows = sharding.own_rows(batch, mesh, is_text)
    ((part, share),) = microbatches.split_batch(rows.batch, 1, is_text, rows.total)
    loss = _share(model, part, share, rows)
    return sharding.sum_rows(loss, mesh) / rules.row_ways(sharding.sizes_of(mesh))
