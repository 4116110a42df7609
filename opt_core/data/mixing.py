"""Several sources as one stream of documents, in the proportion of their weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from opt_core.data.readers import Document


@dataclass
class SourceReport:
    """The part that one source has in a prepared data set.

    Attributes:
        documents: Documents read of it, readable or not.
        bytes: Bytes of text read, in UTF-8.
        kept: Documents that were neither dropped nor left unread.
        tokens: Their tokens, with the one after each.
        share: Part of all tokens that are kept.
        is_exhausted: Whether it was read to its end.
    """

    documents: int = 0
    bytes: int = 0
    kept: int = 0
    tokens: int = 0
    share: float = 0.0
    is_exhausted: bool = False


def in_turn(
    sources: Sequence[Iterator[Document]],
    weights: Sequence[float] | None,
    reports: Sequence[SourceReport],
) -> Iterator[tuple[int, Document]]:
    """The documents of all sources, each with the number of its source.

    Without weights one source follows the other. With them the next document is of the source that
    has given least text for its weight; when one has no more, all end, so that the proportion holds
    to the last document. Nothing is drawn: the same sources give the same stream.

    Args:
        sources: Documents of each.
        weights: Share of each in the text, in any unit; None: all of everything.
        reports: Marked as read to its end, one for each.
    """
    if weights is None:
        for number, documents in enumerate(sources):
            for document in documents:
                yield number, document
            reports[number].is_exhausted = True
        return
    given = [0] * len(sources)
    while True:
        number = min(range(len(sources)), key=lambda i: (given[i] / weights[i], i))
        document = next(sources[number], None)
        if document is None:
            reports[number].is_exhausted = True
            return
        given[number] += max(1, len(document.text))
        yield number, document
