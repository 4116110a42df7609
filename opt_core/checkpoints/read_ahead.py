"""Parts of a model that are read from their files when their turn comes, and let go of afterwards.

A model larger than memory would be read anew for every token in any case; left to itself, the
system finds out page by page, waits for each, and drops those that are needed next. Told in time,
it reads from the disk without a pause: while one part is computed, the next ones come in. What fits
into memory stays there, in parts that are spread evenly between the others, so that there is
something to compute while these are read.

Nothing of this decides what is read, only when: an array over a file has the file's numbers,
whether its pages were asked for or not.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from opt_core.checkpoints.tensor_file import TensorFile
from opt_core.checkpoints.tensors import StoredTensor

_GAP = 1 << 20
"""Bytes between two tensors that are read rather than left out: small tensors of the same layer."""


class Span(NamedTuple):
    """Bytes of a file that belong together.

    Attributes:
        source: The open file.
        start: The first byte.
        stop: The byte behind the last.
    """

    source: TensorFile
    start: int
    stop: int


class ReadAhead:
    """The parts of a model that are computed one after the other, again and again."""

    def __init__(self, parts: Sequence[Sequence[StoredTensor]], room: float):
        """Divides the parts into those that stay in memory and those that are let go of.

        Args:
            parts: The tensors of each part, in the order of computing.
            room: Bytes of memory that parts may stay in.
        """
        self._spans = [_spans(tensors) for tensors in parts]
        sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in parts]
        self.kept = _kept(sizes, room)
        self.bytes_per_pass = sum(n for i, n in enumerate(sizes) if i not in self.kept)
        self._reader = ThreadPoolExecutor(1, "read-ahead")
        self._asked: dict[int, Future[None]] = {}

    def enter(self, part: int) -> None:
        """Begins a part: it is waited for, and the system is asked for what is read after it."""
        for number in self._next(part):
            if number not in self._asked:
                self._asked[number] = self._reader.submit(self._read, number)
        self._asked[part].result()

    def leave(self, part: int) -> None:
        """Ends a part: its memory is let go of, unless there is room for it."""
        self._asked.pop(part, None)
        if part not in self.kept:
            for span in self._spans[part]:
                span.source.drop(span.start, span.stop)

    def _next(self, part: int) -> Iterator[int]:
        """A part and those behind it, up to the first that has to be read from the disk."""
        yield part
        for i in range(1, len(self._spans)):
            number = (part + i) % len(self._spans)
            yield number
            if number not in self.kept:
                return

    def _read(self, part: int) -> None:
        for span in self._spans[part]:
            span.source.prefetch(span.start, span.stop)


def _spans(tensors: Sequence[StoredTensor]) -> list[Span]:
    """The bytes of tensors in the order of their files, neighbours together."""
    spans: list[Span] = []
    for tensor in sorted(tensors, key=lambda t: (str(t.file), t.offset)):
        stop = tensor.offset + tensor.extent
        last = spans[-1] if spans else None
        near = last is not None and last.source is tensor.source
        if last is not None and near and tensor.offset - last.stop <= _GAP:
            spans[-1] = last._replace(stop=max(last.stop, stop))
        else:
            spans.append(Span(tensor.source, tensor.offset, stop))
    return spans


def _kept(sizes: Sequence[int], room: float) -> frozenset[int]:
    """Numbers of the parts that stay: as many as there is room for, at even distances."""
    share = min(1.0, room / max(1, sum(sizes)))
    kept: list[int] = []
    seen = used = 0
    for number, size in enumerate(sizes):
        seen += size
        if used + size <= seen * share:
            kept.append(number)
            used += size
    return frozenset(kept)
