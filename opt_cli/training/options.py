"""The settings of a training as options: one for each field of `TrainConfig`."""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from opt_cli import console
from opt_core.training import TrainConfig

_HELP: dict[str, dict[str, str]] = {
    "Training": {
        "max_steps": "Optimizer steps.",
        "batch_size": "Rows per step.",
        "sequence_length": "Tokens per row.",
    },
    "Optimizer": {
        "learning_rate": "Peak learning rate.",
        "warmup_steps": "Steps over which the rate rises linearly from 0 to its peak.",
        "lr_schedule": (
            'How it falls afterwards: "cosine", "linear" or "polynomial", to min_lr_ratio of '
            'the peak at max_steps, or "constant".'
        ),
        "lr_power": "Exponent of the polynomial.",
        "min_lr_ratio": "Last learning rate as a share of the peak.",
        "adam_beta1": "Decay of the gradient's running mean.",
        "adam_beta2": "Decay of the squared gradient's running mean.",
        "adam_epsilon": "Added to the root of the squared gradient's mean.",
        "weight_decay": "Decoupled decay of every weight but biases and norms (ParamSpec.decays).",
        "max_grad_norm": "Gradients are scaled down to this global L2 norm.",
        "seed": "Of batches, dropout and new weights.",
    },
    "Computation": {
        "gradient_accumulation_steps": (
            "Parts that the rows of a step are computed in, one after the other, to save "
            "memory; the step is the same. It divides batch_size."
        ),
        "precision": (
            'What products are computed in: "float32", or "bfloat16" with float32 weights.'
        ),
        "gradient_checkpointing": "Compute activations again when they are needed, to save memory.",
    },
    "Regularisation": {
        "dropout": "Of hidden states; by default as the model has it.",
        "attention_dropout": "Of attention weights; by default as the model has it.",
        "label_smoothing": (
            "Share of the likelihood that is asked for everywhere, not at the label."
        ),
    },
    "Adapters": {
        "lora_rank": "Rank of low-rank adapters, which are trained in place of the model; 0: none.",
        "lora_alpha": "The adapters' output is scaled by lora_alpha / lora_rank.",
        "lora_targets": (
            "Linear layers that get an adapter: q_proj, k_proj, v_proj, out_proj, fc1, fc2."
        ),
        "freeze": 'Names of parameters that are not trained, such as "model.decoder.layers.0.*".',
    },
    "Validation and checkpoints": {
        "eval_every": "Steps between validations; 0: none.",
        "eval_batches": "Batches of a validation; 0: all there are.",
        "patience": "Validations without a better loss before training stops; 0: never.",
        "save_every": "Steps between checkpoints; 0: at the end only.",
        "keep_checkpoints": (
            "Newest checkpoints to keep; the best one by validation is kept as well."
        ),
        "max_skipped_steps": (
            "Steps in a row that may be skipped because their loss or gradient was not "
            "finite; one more ends the run."
        ),
    },
}
"""Groups of options, and what each of them says of itself: every field of `TrainConfig`."""


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command an option for every field of `TrainConfig`.

    Args:
        command: Its keyword argument `given` receives what was given on the command line, by the
            names of the fields.
    """
    own = [p for p in inspect.signature(command).parameters.values() if p.name != "given"]
    settings = _parameters()

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        given = {p.name: values.pop(p.name) for p in settings}
        names = ("lora_targets", "freeze")
        given |= {k: tuple(filter(None, given[k].split(","))) for k in names if given[k]}
        command(**values, given={k: v for k, v in given.items() if v is not None})

    parameters = [*own, *settings]
    hints = get_type_hints(command, include_extras=True)
    annotations = {p.name: hints.get(p.name, p.annotation) for p in parameters}
    wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = annotations
    return wrapped


def _parameters() -> list[inspect.Parameter]:
    settings = {field.name: field for field in fields(TrainConfig)}
    return [
        _parameter(settings[name], text, panel)
        for panel, texts in _HELP.items()
        for name, text in texts.items()
    ]


def _parameter(field: Field[Any], text: str, panel: str) -> inspect.Parameter:
    default, kind = field.default, _kind(field.type)
    if default not in (None, False, ()):
        shown = ",".join(default) if isinstance(default, tuple) else default
        text = f"{text.removesuffix('.')} (default: {shown})."
    names = [console.option(field.name)] if kind is bool else []
    option = typer.Option(
        *names, help=text, rich_help_panel=panel, show_default=False,
        metavar={int: "N", float: "X", str: "NAME", bool: None}[kind],
    )  # fmt: skip
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None,
        annotation=Annotated[kind | None, option],
    )  # fmt: skip


def _kind(annotation: Any) -> Any:
    """The type of a field on the command line: names are given as one text, with commas."""
    if get_origin(annotation) is types.UnionType:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) in (Literal, tuple):
        return str
    return annotation
