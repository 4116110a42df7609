"""Steps, evaluations and trainings as in every backend, given its own functions."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from opt_core.errors import InputError
from opt_core.params import ParamSpec
from opt_core.quantization import check_not_quantized, is_quantized
from opt_core.training.config import TrainConfig
from opt_core.training.labels import question_answering
from opt_core.training.microbatches import Batch, count_labels


def prepare_model(model: Any, config: TrainConfig, lora: Any) -> list[ParamSpec]:
    """Makes a model ready for a training, but for what a framework calls trainable.

    Args:
        model: The model; it gets adapters where the configuration asks for them.
        config: How to train it.
        lora: The backend's module `lora`.

    Returns:
        The parameters that are trained.
    """
    check_not_quantized(model, "make_optimizer")
    if config.lora_rank and not lora.adapters(model):
        lora.apply(model, config.lora_rank, config.lora_alpha, config.lora_targets, config.seed)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    return config.trained_specs(model.config, model.head)


def batch_loss(
    model: Any,
    batch: Batch,
    losses: Any,
    get_head: Callable[[Any], Any],
    label_smoothing: float = 0.0,
    items: float | None = None,
    **options: Any,
) -> Any:
    """The mean loss of one batch.

    Args:
        model: With a head.
        batch: From `opt_core.training.microbatches.as_batch`.
        losses: The backend's module `losses`.
        get_head: Gives the weight (V, P) of a language model's head; None where the logits must be
            the model's own.
        label_smoothing: Share of the likelihood that is asked for everywhere.
        items: Of a language model without `get_head`'s weight: what the sum over the tokens is
            divided by; None: their number.
        **options: More inputs of the model.
    """
    inputs = batch | options | {"use_cache": False}
    if model.head == "causal_lm":
        labels, head = inputs.pop("labels"), None if is_quantized(model) else get_head(model)
        if head is None:
            return losses.causal_lm(model(**inputs).logits, labels, label_smoothing, items)
        hidden = model.model(**inputs).last_hidden_state
        return losses.chunked_causal_lm(hidden, head, labels, label_smoothing)
    if model.head == "sequence_classification":
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return losses.classification(logits, labels, model.config, label_smoothing)
    start, end = inputs.pop("start_positions"), inputs.pop("end_positions")
    out = model(**inputs)
    return question_answering(losses, out.start_logits, out.end_logits, start, end, label_smoothing)


def mean_loss(
    batches: Iterable[Batch], is_language_model: bool, loss: Callable[[Batch], Any]
) -> float:
    """Mean loss (in nats per prediction) over some batches.

    Args:
        batches: From `opt_core.training.microbatches.as_batch`.
        is_language_model: As in `count_labels`.
        loss: The mean loss of one batch.

    Raises:
        InputError: There is nothing to predict.
    """
    total, count = 0.0, 0
    for batch in batches:
        predicted = count_labels(batch, is_language_model)
        if predicted:
            total += float(loss(batch)) * predicted
        count += predicted
    if count == 0:
        raise InputError("evaluate: expected batches with something to predict, received none")
    return total / count


def take_steps(
    model: Any,
    optimizer: Any,
    batches: Iterator[Any],
    config: TrainConfig,
    train_step: Callable[..., tuple[float, float]],
    report: Callable[[int, float], None] | None,
) -> None:
    """Takes `config.max_steps` steps.

    Args:
        model: The model to train, in place.
        optimizer: From the backend's `make_optimizer`.
        batches: One for each step.
        config: How to train.
        train_step: The backend's.
        report: Called after each step with its number and loss.

    Raises:
        InputError: The batches ended too soon.
    """
    for step in range(config.max_steps):
        batch = next(batches, None)
        if batch is None:
            raise InputError(f"fit: the batches ended at step {step} of {config.max_steps}")
        loss, _ = train_step(model, optimizer, batch, config, step)
        if report is not None:
            report(step, loss)
