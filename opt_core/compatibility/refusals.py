"""Methods of other libraries that there are not: each says what to do in its place."""

from collections.abc import Callable, Mapping
from typing import Any


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
