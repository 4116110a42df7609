"""Help as every command shows it: one kind of placeholder, paragraphs that flow."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import typer
from typer.core import TyperArgument, TyperCommand, TyperOption

from opt_cli import console

PLACEHOLDERS = frozenset(
    ["MODEL", "RUN", "DATA", "FILE", "DIR", "REPO", "NAME", "TASK", "TEXT", "SIZE", "N", "X"]
)
"""Words that stand for a value in help: an integer N, a number X, a FILE; switches have none."""


class Command(TyperCommand):
    """A command whose help shows its placeholders instead of Python's types."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.help = _flowing(self.help)

    def get_params(self, ctx: Any) -> list[Any]:
        """Arguments and options, each shown as users write it."""
        return [_plain(parameter) for parameter in super().get_params(ctx)]


class Group(console.PipeGroup):
    """A group of commands, its own options shown in the same way."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Options, each shown as users write it."""
        return [_plain(parameter) for parameter in super().get_params(ctx)]


class App(typer.Typer):
    """A typer application of such commands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(cls=Group, **options)

    def command(
        self, name: str | None = None, *, cls: Any = Command, **options: Any
    ) -> Callable[[Any], Any]:
        """Adds a command."""
        return super().command(name, cls=cls, **options)


def _plain(parameter: Any) -> Any:
    if isinstance(parameter, TyperArgument):
        parameter.display_type_rich = lambda ctx: ""  # the name says it
    elif isinstance(parameter, TyperOption) and parameter.is_flag:
        parameter.metavar = ""
    return parameter


def _flowing(text: str | None) -> str | None:
    """Text whose paragraphs are one line each: the terminal knows better where to break them."""
    return text and re.sub(r"(?<!\n)\n(?!\n)", " ", inspect.cleandoc(text))
