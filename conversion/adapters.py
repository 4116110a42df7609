"""The part of a description that adapters alone have."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

from opt_core.adapters.tensors import AdapterFolder
from opt_core.checkpoints.tensors import StoredTensor


@dataclass(frozen=True)
class AdapterSummary:
    """A PEFT adapter in a few words.

    Attributes:
        base: The model it is for, as its configuration calls it.
        task_type: PEFT's name of its task.
        rank: Its rank, where its patterns give no other.
        alpha: Its scale times its rank, likewise.
        layers: How many weights have adapters.
        targets: The last names of these, each once.
        whole: Parameters that it has in whole, or rows of.
    """

    base: str
    task_type: str
    rank: int
    alpha: float
    layers: int
    targets: tuple[str, ...]
    whole: tuple[str, ...]


def summarize(adapter: AdapterFolder) -> AdapterSummary:
    """An adapter in a few words."""
    settings = adapter.settings
    adapted = [name for name, parts in adapter.parts.items() if parts.has_adapter]
    targets = {name.split(".")[-2] for name in adapted}
    whole = (n for n, p in adapter.parts.items() if p.whole is not None or p.tokens is not None)
    return AdapterSummary(
        settings.base, settings.task_type, settings.r, settings.lora_alpha, len(adapted),
        tuple(sorted(targets)), tuple(sorted(whole)),
    )  # fmt: skip


def tensors_of(adapter: AdapterFolder) -> Iterator[StoredTensor]:
    """The tensors of an adapter's file."""
    for parts in adapter.parts.values():
        for field in fields(parts):
            tensor = getattr(parts, field.name)
            if tensor is not None:
                yield tensor
