"""Batches with a saved position: a run that was interrupted goes on at the very next one.

Examples come in one stream, epoch after epoch, each epoch in an order of its own; a batch is the
next `batch_size` of them, across the end of an epoch where it falls there. The position is a count
of examples, so that it means the same on any number of hosts.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import DataError

Example = NDArray[np.int32] | Mapping[str, Any]
"""A block of tokens, or the named arrays of a labelled text."""


class Source(Protocol):
    """A sequence of examples: `TokenBlocks`, or a list of dicts of arrays."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One `Example`."""
        ...


class Batches(Iterator[dict[str, NDArray[np.int32]]]):
    """An endless or finite iterator of batches.

    A batch of token blocks is {"input_ids": [B, T], "labels": [B, T]}, the same ids twice (a model
    shifts them). A batch of labelled texts has the names its examples have, one row for each.

    Args:
        source: The examples.
        batch_size: Examples per global batch; `hosts` divides it.
        seed: Of the order.
        shuffle: Whether each epoch has an order of its own; otherwise all keep the source's.
        epochs: How often to go through the source; None: without end. The last batch of all may be
            smaller; what several hosts cannot share evenly of it is left out.
        host: Which part of each global batch to yield, from 0.
        hosts: Number of parts.

    Raises:
        DataError: No examples, or numbers that do not fit.
    """

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        epochs: int | None = None,
        host: int = 0,
        hosts: int = 1,
    ) -> None:
        if not len(source):
            raise DataError("batches: expected examples, received none")
        if hosts < 1 or batch_size < 1 or batch_size % hosts:
            raise DataError(
                f"batch_size={batch_size} must be a multiple of the number of hosts, {hosts}"
            )
        if not 0 <= host < hosts:
            raise DataError(f"host: expected 0..{hosts - 1}, received {host}")
        if epochs is not None and epochs < 1:
            raise DataError(f"epochs: expected at least 1, received {epochs}")
        if seed < 0:
            raise DataError(f"seed: expected an integer >= 0, received {seed}")
        self._source, self._batch_size, self._seed, self._shuffle = (
            source, batch_size, seed, shuffle,
        )  # fmt: skip
        self._total = None if epochs is None else epochs * len(source)
        self._host, self._hosts = host, hosts
        self._batch = self._seen = 0
        self._order: tuple[int, NDArray[np.int64]] | None = None

    def __iter__(self) -> "Batches":
        """Itself: a position belongs to one iterator."""
        return self

    def __next__(self) -> dict[str, NDArray[np.int32]]:
        """This host's part of the next batch."""
        count = self._batch_size
        if self._total is not None:
            count = min(count, self._total - self._seen)
        share = count // self._hosts
        if not share:
            raise StopIteration
        first = self._seen + self._host * share
        examples = [self._source[self._index(first + i)] for i in range(share)]
        self._seen += count
        self._batch += 1
        return collate(examples)

    def state(self) -> dict[str, int]:
        """The position, for a checkpoint: plain numbers, the same on every host."""
        return {
            "epoch": self._seen // len(self._source),
            "batch": self._batch,
            "examples_seen": self._seen,
            "examples": len(self._source),
            "seed": self._seed,
            "shuffle": int(self._shuffle),
        }

    def restore(self, state: Mapping[str, int]) -> None:
        """Goes to a saved position: the next batch is the one that would have come then.

        Args:
            state: What `state` returned, on any number of hosts.

        Raises:
            DataError: It is no position, or one in other data or another order.
        """
        expected = self.state()
        for name in expected:
            if type(state.get(name)) is not int or state[name] < 0:
                raise DataError(f"position: {name}: expected a number, found {state.get(name)!r}")
        for name in ("examples", "seed", "shuffle"):
            if state[name] != expected[name]:
                raise DataError(
                    f"position: saved with {name}={state[name]}, this run has "
                    f"{name}={expected[name]}: another order of examples"
                )
        self._batch, self._seen = state["batch"], state["examples_seen"]

    def _index(self, position: int) -> int:
        """Where in the source the example at a position of the stream is."""
        epoch, place = divmod(position, len(self._source))
        if not self._shuffle:
            return place
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._source))
            self._order = epoch, order
        return int(self._order[1][place])


def collate(examples: list[Any]) -> dict[str, NDArray[np.int32]]:
    """One batch of some examples, integers as int32.

    Raises:
        DataError: Examples of different names or shapes.
    """
    if not isinstance(examples[0], Mapping):
        ids = np.stack(examples).astype(np.int32, copy=False)
        return {"input_ids": ids, "labels": ids.copy()}
    try:
        names: list[str] = [*examples[0]]
        rows = {name: np.stack([e[name] for e in examples]) for name in names}
    except (KeyError, ValueError):
        raise DataError("examples of one batch differ in their names or shapes") from None
    return {
        name: values.astype(np.int32) if values.dtype.kind in "iub" else values
        for name, values in rows.items()
    }
