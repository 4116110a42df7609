"""Methods and attributes of other libraries that there are not: each says what to do instead."""

from collections.abc import Callable, Mapping
from typing import Any

from opt_core.errors import AbsentError


def refuse_attributes(owner: type, refused: Mapping[str, str]) -> None:
    """Gives a class attributes that raise an `AbsentError`, of the class as of its objects.

    `hasattr` finds them missing, as it should.

    Args:
        owner: The class, which has no `__getattr__`.
        refused: Advice by the attribute's name.
    """
    for name, advice in refused.items():
        setattr(owner, name, _Absent(name, advice))


class _Absent:
    """A descriptor that refuses."""

    def __init__(self, name: str, advice: str):
        self.name, self.advice = name, advice

    def __get__(self, instance: Any, owner: type) -> Any:
        raise AbsentError(f"{owner.__name__}.{self.name} is not supported: {self.advice}")


def refuse_methods(
    owner: type,
    refused: Mapping[str, str],
    error: type[Exception],
    line: str = "{owner}.{name} is not supported: {advice}",
) -> None:
    """Gives a class methods that raise an error and do nothing.

    Args:
        owner: The class.
        refused: Advice by the method's name.
        error: What is raised.
        line: Its text; `owner` is the class of the object.
    """
    for name, advice in refused.items():
        setattr(owner, name, _refusal(name, advice, error, line))


def _refusal(name: str, advice: str, error: type[Exception], line: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise error(line.format(owner=type(self).__name__, name=name, advice=advice))

    method.__name__, method.__doc__ = name, f"Refused: {advice}."
    return method
