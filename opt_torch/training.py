"""Training: the optimizer, one step, and the loop around it."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import AdamW

from opt_core.errors import InputError
from opt_core.params import param_specs
from opt_core.training import TrainConfig
from opt_torch.checkpoint import locate
from opt_torch.quantization import refuse

if TYPE_CHECKING:
    from opt_torch.modeling import OPTForCausalLM, OPTPreTrainedModel


def make_optimizer(model: "OPTPreTrainedModel", config: TrainConfig) -> AdamW:
    """AdamW with weight decay on the parameters that `ParamSpec.decays`."""
    refuse(model, "make_optimizer")
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for spec in param_specs(model.config, model.head):
        module, leaf = locate(model, spec)
        groups[spec.decays].append(getattr(module, leaf))
    return AdamW(
        [
            {"params": groups[True], "weight_decay": config.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def train_step(
    model: "OPTForCausalLM", optimizer: AdamW, batch: Any, config: TrainConfig, step: int
) -> tuple[float, float]:
    """One optimizer step on one batch.

    Args:
        model: In training mode where dropout is wanted.
        optimizer: From `make_optimizer`.
        batch: (B, T) ids, which are the labels too.
        config: Learning rate and gradient clipping.
        step: Step number, from 0.

    Returns:
        The loss in nats per token, and the gradient's norm before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    loss = model(batch, labels=batch).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), norm.item()


@torch.inference_mode()
def evaluate(model: "OPTForCausalLM", batches: Iterable[Any]) -> float:
    """Mean loss in nats per predicted token over some batches of equal rows, without dropout."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        predicted = batch.shape[0] * (batch.shape[1] - 1)
        total += model(batch, labels=batch).loss.item() * predicted
        count += predicted
    model.train(was_training)
    if count == 0:
        raise InputError("evaluate: expected batches with at least two tokens a row, received none")
    return total / count


def fit(
    model: "OPTForCausalLM",
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
    torch.manual_seed(config.seed)  # of dropout
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
