"""Processes that run one program together: who speaks, and how the failure of one becomes all's."""

from collections.abc import Callable
from typing import Any, TypeVar

from opt_core.errors import OPTError, TrainingError

T = TypeVar("T")


class Team:
    """Processes that run the same program; this one is alone.

    Attributes:
        index: Number of this process; the first one, 0, writes and reports.
        count: Number of processes.
    """

    index = 0
    count = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes and reports."""
        return self.index == 0

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, in their order; it can be pickled."""
        return [value]

    def together(self, act: Callable[[], T]) -> T:
        """Does something in every process; where it fails in one, it fails in all.

        Args:
            act: What to do; it must wait for no other process behind the place where it may fail.

        Raises:
            OPTError: It failed somewhere: the first such process' error.
        """
        if self.count == 1:
            return act()
        result, failure = None, None
        try:
            result = act()
        except (OPTError, OSError) as error:
            failure = error
        found = self.gather(failure)
        first = next((error for error in found if error is not None), None)
        if first is not None:
            raise first
        return result  # pyright: ignore[reportReturnType]

    def first(self, act: Callable[[], T]) -> T:
        """Does something in the first process, whose result, or error, all have.

        Args:
            act: What to do; its result can be pickled.

        Raises:
            OPTError: It failed.
        """
        if self.count == 1:
            return act()
        found: list[Any] = []
        self.together(lambda: found.append(act()) if self.is_first else None)
        return self.gather(found)[0][0]

    def check_same(self, what: str, value: Any) -> None:
        """Refuses to go on where processes differ.

        Args:
            what: What is compared, for the message.
            value: This process' own; it can be pickled. Of dicts what differs is told of alone.

        Raises:
            TrainingError: They do: the same message in every process.
        """
        values = self.gather(value)
        for number, other in enumerate(values):
            if other != values[0]:
                ours, theirs = _differences(values[0], other)
                raise TrainingError(
                    f"{what}: process 0 has {ours}, process {number} has {theirs}; "
                    "start all with the same command on the same data"
                )


def _differences(one: Any, other: Any) -> tuple[str, str]:
    """Two values in words, of dicts (of dicts) only the items that differ."""
    both: list[Any] = [one, other]
    if not all(isinstance(values, dict) for values in both):
        return repr(one), repr(other)
    names = [k for k in {**both[0], **both[1]} if both[0].get(k) != both[1].get(k)]
    found = [(name, _differences(*(values.get(name) for values in both))) for name in names]
    ours, theirs = (", ".join(f"{name}={pair[i]}" for name, pair in found) for i in (0, 1))
    return ours, theirs
