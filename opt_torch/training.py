"""Training: the optimizer, one step, and the loop around it."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import AdamW

from opt_core.training import microbatches, steps
from opt_core.training.config import TrainConfig
from opt_torch import lora, losses
from opt_torch.checkpoint import locate

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel


def make_optimizer(model: "OPTPreTrainedModel", config: TrainConfig) -> AdamW:
    """Makes a model ready for a training and returns its AdamW.

    Adapters are put on it where the configuration asks for them; what is not trained gets no
    gradient. Weight decay applies to the parameters that `ParamSpec.decays`.
    """
    trained = steps.prepare_model(model, config, lora)
    model.requires_grad_(False)
    groups: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
    for spec in trained:
        groups[spec.decays].append(locate(model, spec).requires_grad_(True))
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
    model: "OPTPreTrainedModel", optimizer: AdamW, batch: Any, config: TrainConfig, step: int
) -> tuple[float, float]:
    """One optimizer step on one batch.

    What is dropped depends on the seed and the step's number alone. If the loss or the gradient is
    not finite, the step is skipped.

    Args:
        model: In training mode where dropout is wanted.
        optimizer: From `make_optimizer`.
        batch: (B, T) ids, which are the labels too, or a dict of the model's inputs and labels.
        config: Learning rate, clipping and the rest.
        step: Step number, from 0.

    Returns:
        The loss (in nats per token), and the gradient's norm before clipping.
    """
    for group in optimizer.param_groups:
        group["lr"] = config.learning_rate_at(step)
    device = model.device
    total = torch.zeros((), device=device)
    named = microbatches.as_batch(batch)
    parts = microbatches.split_batch(
        named, config.gradient_accumulation_steps, model.head == "causal_lm"
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for number, (part, share) in enumerate(parts):
            torch.manual_seed(config.dropout_seed(step, number))
            with torch.autocast(device.type, torch.bfloat16, config.precision == "bfloat16"):
                loss = share * steps.batch_loss(model, part, losses, _head, config.label_smoothing)
            loss.backward()
            total += loss.detach()
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm).item()
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


@torch.inference_mode()
def evaluate(model: "OPTPreTrainedModel", batches: Iterable[Any]) -> float:
    """Mean loss (in nats per predicted token) over some batches, without dropout."""
    was_training = model.training
    model.eval()
    named = map(microbatches.as_batch, batches)
    try:
        return steps.mean_loss(
            named, model.head == "causal_lm", lambda b: steps.batch_loss(model, b, losses, _head)
        )
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
    """Weight of the language-model head (V, P), where `losses.chunked_causal_lm` can use it."""
    return model.lm_head.weight
