"""The settings of a training as options: one for each field of `TrainConfig`, its own help text."""

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import fields
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from opt_core.training.config import TrainConfig

_PANELS = {
    "learning_rate": "Optimizer", "gradient_accumulation_steps": "Computation",
    "dropout": "Regularisation", "lora_rank": "Adapters", "eval_every": "Watching",
}  # fmt: skip
"""The field that begins each group of options."""


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
    help_texts, panel, found = _help_texts(), "Training", list[inspect.Parameter]()
    for field in fields(TrainConfig):
        panel = _PANELS.get(field.name, panel)
        default, kind = field.default, _kind(field.type)
        text = help_texts[field.name]
        if default not in (None, False, ()):
            shown = ",".join(default) if isinstance(default, tuple) else default
            text = f"{text.removesuffix('.')} (default: {shown})."
        names = [f"--{field.name.replace('_', '-')}"] if kind is bool else []
        option = typer.Option(
            *names, help=text, rich_help_panel=panel, show_default=False,
            metavar={int: "N", float: "X", str: "NAME", bool: None}[kind],
        )  # fmt: skip
        annotation = Annotated[kind | None, option]
        found.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
            )
        )
    return found


def _kind(annotation: Any) -> Any:
    """What the command line takes for a field: names are given as one text, with commas."""
    if get_origin(annotation) is types.UnionType:
        annotation = next(part for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) in (Literal, tuple):
        return str
    return annotation


def _help_texts() -> dict[str, str]:
    """The attributes' descriptions, from the class's own documentation."""
    lines = inspect.cleandoc(TrainConfig.__doc__ or "").partition("Attributes:\n")[2].splitlines()
    texts: dict[str, str] = {}
    name = ""
    for line in lines:
        if line and not line.startswith(" "):
            break
        if line.startswith("    ") and not line.startswith("     "):
            name, _, text = line.strip().partition(": ")
            texts[name] = text
        elif line.strip():
            texts[name] += " " + line.strip()
    return {name: text.replace("`", "") for name, text in texts.items()}
