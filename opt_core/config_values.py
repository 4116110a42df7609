"""Values of a configuration's fields in one form, whatever a caller has them in; snapshots."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from opt_core.errors import ConfigError


class DtypeName(str):
    """The name of a data type, which equals the frameworks' own type of that name."""

    __slots__ = ()

    def __hash__(self) -> int:
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other if isinstance(other, str) else _name_of(other))

    def __ne__(self, other: object) -> bool:
        return not self == other


def dtype_name(value: Any) -> Any:
    """The name of a data type, however a framework writes it; None stays None.

    Args:
        value: "float16", "torch.float16", or a type of PyTorch, TensorFlow, JAX or NumPy.
    """
    if value is None or value == "":
        return value
    return DtypeName(_name_of(value))


def _name_of(value: Any) -> str:
    if isinstance(value, str):
        return value.removeprefix("torch.")
    name = getattr(getattr(value, "dtype", value), "name", None)  # jnp.float16 has a dtype
    if name is None and isinstance(value, type):
        name = value.__name__  # numpy.float16
    return name or str(value).removeprefix("torch.")


def _ids(value: Any) -> Any:
    """One id, or several as a tuple."""
    return tuple(cast(Sequence[Any], value)) if isinstance(value, list) else value


NORMAL: dict[str, Callable[[Any], Any]] = {"dtype": dtype_name, "eos_token_id": _ids}
"""Field -> what puts its value in one form."""


def default_labels(count: int) -> dict[int, str]:
    """Class names where nobody gave any."""
    return {i: f"LABEL_{i}" for i in range(count)}


def labels_by_index(labels: Any, source: str) -> dict[int, str]:
    """Class names by index, whatever a file or a caller has them in."""
    if isinstance(labels, list | tuple):
        labels = dict(enumerate(cast(Sequence[Any], labels)))
    try:
        return {int(k): str(v) for k, v in labels.items()}
    except (ValueError, TypeError, AttributeError):
        where = f"{source}: " if source else ""
        raise ConfigError(f"{where}id2label keys must be integers: {labels!r}") from None


@dataclass(frozen=True)
class Snapshot:
    """A configuration that nobody sets any more, to tell programs apart by.

    Attributes:
        config: The configuration.
        number: Its hash: programs are looked up at every call.
    """

    config: Any
    number: int

    def __hash__(self) -> int:
        return self.number
