"""Prepares text for training: read, clean, drop duplicates, split, tokenise, write token blocks.

Documents are cleaned and tokenised a chunk at a time, by `chunks` or on a cluster, and come back in
the order they were read in: the result does not depend on where that was.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from opt_core.checkpoints.atomic import new_folder
from opt_core.data.chunks import Chunk, open_processes, process_chunks
from opt_core.data.cleaning import Cleaning
from opt_core.data.deduplication import DuplicateFilter
from opt_core.data.mixing import SourceReport, in_turn
from opt_core.data.ray_cluster import open_cluster
from opt_core.data.readers import Document, find_files, read_documents, refuse
from opt_core.data.token_blocks import BlockWriter
from opt_core.data.tokenization import end_token, start_tokens
from opt_core.errors import DataError
from opt_core.json_files import write_json
from opt_core.text.adapter import as_tokenizer
from opt_core.text.tokenizer import OPTTokenizer

TRAIN, VALIDATION = "train", "validation"
REPORT_FILE = "report.json"
_CHUNK = 1 << 19  # characters
_EXAMPLES = 3  # places named per reason
ENGINES = ("processes", "ray")
"""Places where documents are cleaned and tokenised: this machine, or a cluster."""


@dataclass(frozen=True)
class DataConfig:
    """How to turn files into token blocks.

    Attributes:
        sequence_length: Tokens per block.
        validation_fraction: Share of the documents to hold out. A document's own text decides, so
            that it stays on its side when others are added. None: 0.01, or nothing where that
            leaves less than a block to validate or to train on, as of a single text.
        text_field: Where the text is in JSON lines and tables.
        separator: What separates the documents of a text file; None: each file is one document.
        skip_bad: Whether to drop and count what cannot be read, rather than stop there.
        cleaning: What to change and what to drop.
        weights: Share of each source in the text that is read, in any unit, one for each file or
            folder named; reading ends with the first source that has no more. None: all of every
            source.

    Raises:
        DataError: A value out of range.
    """

    sequence_length: int = 2048
    validation_fraction: float | None = None
    text_field: str = "text"
    separator: str | None = None
    skip_bad: bool = False
    cleaning: Cleaning = field(default_factory=Cleaning)
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise DataError(
                f"validation_fraction: expected 0 <= x < 1, received {self.validation_fraction}"
            )
        if self.separator == "":
            raise DataError("separator: expected some characters, received none")
        if self.weights is not None and not all(0 < x < math.inf for x in self.weights):
            raise DataError(f"weights: expected numbers above 0, received {self.weights}")

    @property
    def held_out(self) -> float:
        """The share of the documents to hold out if there are enough."""
        return 0.01 if self.validation_fraction is None else self.validation_fraction


@dataclass
class Split:
    """One side of a prepared data set.

    Attributes:
        documents: Documents in it.
        tokens: Their tokens, with the one after each.
        blocks: Blocks that they fill.
        left_out: Tokens at the end that fill no block.
    """

    documents: int = 0
    tokens: int = 0
    blocks: int = 0
    left_out: int = 0


@dataclass
class DataReport:
    """A report of prepared files: documents read, dropped and kept.

    Attributes:
        files: Files read.
        documents: Documents in them, readable or not.
        bytes: Bytes of text read, in UTF-8.
        removed_characters: Characters that belong in no text, removed from documents.
        dropped: Reason -> number of documents dropped for it.
        examples: Reason -> where the first of them are.
        splits: "train" and, where something is held out, "validation".
        sources: What each file or folder that was named gave, by its name.
    """

    files: int = 0
    documents: int = 0
    bytes: int = 0
    removed_characters: int = 0
    dropped: dict[str, int] = field(default_factory=dict[str, int])
    examples: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    splits: dict[str, Split] = field(default_factory=dict[str, Split])
    sources: dict[str, SourceReport] = field(default_factory=dict[str, SourceReport])

    def drop(self, place: str, reason: str, message: str = "") -> None:
        """Counts one dropped document."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < _EXAMPLES:
            places.append(f"{place}: {message}" if message else place)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def prepare(
    sources: Iterable[str | PathLike[str]],
    destination: str | PathLike[str],
    tokenizer: OPTTokenizer,
    config: DataConfig | None = None,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
    engine: str = "processes",
) -> DataReport:
    """Writes a folder with `train` and `validation`, token blocks each, and `report.json`.

    Between two documents is the end-of-text token; OPT's stream begins with one, too. The folder
    appears whole or not at all.

    Args:
        sources: Files and folders (`opt_core.data.readers`).
        destination: A new folder.
        tokenizer: Makes the ids.
        config: How; None: the defaults.
        processes: How many processes clean and tokenise. With more than one, a script must keep its
            own work under `if __name__ == "__main__":`, as Python's multiprocessing asks.
        progress: Called with (bytes of the files read, bytes in all).
        engine: "processes", or "ray": all processors of the Ray cluster that RAY_ADDRESS names, or
            that this machine belongs to, or else of this machine; `processes` is not looked at
            then.

    Raises:
        DataError: A source cannot be read, the engine is not there, nothing is left, or less than
            one block is, or the destination exists or cannot be written.
    """
    config = config or DataConfig()
    if processes < 1:
        raise DataError(f"processes: expected at least 1, received {processes}")
    if engine not in ENGINES:
        raise DataError(f"engine: expected {' or '.join(ENGINES)}, received {engine!r}")
    names = [os.fspath(source) for source in sources]
    files = [find_files([name]) for name in names]
    if config.weights is not None and (len(config.weights), len({*names})) != (len(names),) * 2:
        raise DataError(
            f"weights: expected one for each of {len(names)} different sources, received "
            f"{len(config.weights)}"
        )
    report = DataReport(sum(map(len, files)))
    report.sources = {name: SourceReport() for name in names}
    sides = [TRAIN, *([VALIDATION] if config.held_out else [])]
    report.splits = {name: Split() for name in sides}
    tokenizer = as_tokenizer(tokenizer)
    end = np.array([end_token(tokenizer)])
    duplicates = (
        DuplicateFilter(config.cleaning.near_duplicates) if config.cleaning.duplicates else None
    )
    with new_folder(Path(destination), DataError) as stage, ExitStack() as stack:
        writers: dict[str, BlockWriter] = {}
        for name in sides:
            (stage / name).mkdir()
            writer = BlockWriter(stage / name, config.sequence_length, tokenizer.id_limit)
            writers[name] = stack.enter_context(closing(writer))
            writer.write(start_tokens(tokenizer))
        documents = _read_documents(names, files, config, report, progress)
        workers = stack.enter_context(
            open_cluster(tokenizer, config.cleaning)
            if engine == "ray"
            else open_processes(tokenizer, config.cleaning, processes)
        )
        for chunk, result in process_chunks(_chunks(documents), workers):
            kept: dict[str, list[bytes]] = {name: [] for name in sides}
            report.removed_characters += result.removed
            report.bytes += sum(result.sizes)
            for i, (source, document) in enumerate(chunk):
                origin = report.sources[names[source]]
                origin.documents += 1
                origin.bytes += result.sizes[i]
                problem = result.problems[i]
                if problem is None and duplicates is not None:
                    problem = duplicates.problem(result.fingerprints, i)
                if problem is not None:
                    report.drop(document.place, problem)
                    continue
                place = int.from_bytes(result.fingerprints.digests[i][:8]) / 2**64
                name = VALIDATION if place < config.held_out else TRAIN
                kept[name] += (result.ids[i], end.astype(result.dtype).tobytes())
                report.splits[name].documents += 1
                origin.kept += 1
                origin.tokens += len(result.ids[i]) // np.dtype(result.dtype).itemsize + 1
            for name, ids in kept.items():
                writers[name].write(np.frombuffer(b"".join(ids), result.dtype))
        if config.validation_fraction is None:
            _train_on_all_of_little(writers, len(start_tokens(tokenizer)), report)
        _check_not_empty(report)
        for name, writer in writers.items():
            _finish_split(writer, name, report)
        tokens = sum(origin.tokens for origin in report.sources.values())
        for origin in report.sources.values():
            origin.share = round(origin.tokens / tokens, 4)
        write_json(stage / REPORT_FILE, report.to_dict())
    return report


def _read_documents(
    names: list[str],
    files: list[list[Path]],
    config: DataConfig,
    report: DataReport,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[int, Document]]:
    """The documents of all sources; what cannot be read is counted or refused."""
    total = sum(os.stat(path).st_size for paths in files for path in paths)
    done, reports = [0] * len(files), [report.sources[name] for name in names]

    def read(number: int) -> Iterator[Document]:
        def drop(place: str, reason: str, message: str) -> None:
            report.documents += 1
            reports[number].documents += 1
            report.drop(place, reason, message)

        def report_bytes(of_file: int) -> None:
            done[number] = before + of_file
            if progress:
                progress(sum(done), total)

        before, on_bad = 0, drop if config.skip_bad else refuse
        for path in files[number]:
            yield from read_documents(
                path, config.text_field, config.separator, on_bad, report_bytes
            )
            before += os.stat(path).st_size
            report_bytes(0)

    sources = [read(number) for number in range(len(files))]
    for found in in_turn(sources, config.weights, reports):
        report.documents += 1
        yield found


def _chunks(documents: Iterable[tuple[int, Document]]) -> Iterator[Chunk]:
    """Documents in groups of some hundred kilobytes."""
    group: Chunk = []
    size = 0
    for source, document in documents:
        group.append((source, document))
        size += len(document.text)
        if size >= _CHUNK:
            yield group
            group, size = [], 0
    if group:
        yield group


def _train_on_all_of_little(
    writers: dict[str, BlockWriter], start: int, report: DataReport
) -> None:
    """Holds nothing out where that would be no block, or everything."""
    held_out, train = writers[VALIDATION], report.splits[TRAIN]
    if train.documents and held_out.tokens >= held_out.sequence_length:
        return
    writers[TRAIN].write(held_out.take_back()[start:])
    train.documents += report.splits[VALIDATION].documents
    del writers[VALIDATION], report.splits[VALIDATION]


def _check_not_empty(report: DataReport) -> None:
    counts = {name: split.documents for name, split in report.splits.items()}
    if not sum(counts.values()):
        reasons = ", ".join(f"{count} {reason}" for reason, count in report.dropped.items())
        raise DataError(
            f"no document is left of {report.documents} read" + (f": {reasons}" if reasons else "")
        )
    for name, count in counts.items():
        if not count:
            raise DataError(
                f"{name}: none of {sum(counts.values())} documents fell on this side; give more "
                "documents (for text files, name their separator) or another validation_fraction"
            )


def _finish_split(writer: BlockWriter, name: str, report: DataReport) -> None:
    split = report.splits[name]
    split.tokens = writer.tokens
    try:
        split.blocks, split.left_out = writer.finish()
    except DataError as error:
        hint = " or another validation_fraction" if name == VALIDATION else ""
        raise DataError(f"{name}: {error}{hint}") from None
