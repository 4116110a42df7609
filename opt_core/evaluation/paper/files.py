"""Where the public files of a task are below a folder, and what is in them."""

import re
from collections.abc import Sequence
from pathlib import Path

from opt_core.data.readers import read_rows
from opt_core.errors import DataError
from opt_core.evaluation.paper.rows import Doc, read_winograd_xml
from opt_core.evaluation.paper.tasks import PaperTask, Split

SPLITS = {"train": "train", "validation": "(?:validation|valid|val|dev)", "test": "test"}
_SUFFIXES = re.compile(r"(?:\.(?:jsonl|json|csv|parquet|xml))(?:\.(?:gz|zst))?$")
_SHARD = re.compile(r"-\d+-of-\d+$")

BIAS_FILES = {
    "crows_pairs": ("crows_?pairs[^/]*",),
    "stereoset": ("stereoset[^/]*/(data/)?dev", "stereoset[^/]*"),
}
"""Patterns of the files that `read_comparisons` reads, as in `PaperTask.files`."""
TOXICITY_FILES = ("real-?toxicity-?prompts[^/]*/prompts", "prompts")
"""Patterns of RealToxicityPrompts' file."""


def find_files(folder: Path, patterns: Sequence[str], split: Split = "validation") -> list[Path]:
    """The files below a folder that fit the first pattern that any fits: one, or all its shards.

    Args:
        folder: Where to look, at any depth; its own name counts as part of the paths.
        patterns: As in `PaperTask.files`.
        split: What "{}" stands for.

    Raises:
        DataError: The folder is none, or files fit that are not shards of the same.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    stems = {
        path: _SUFFIXES.sub("", f"{folder.resolve().name}/{path.relative_to(folder)}".lower())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and _SUFFIXES.search(path.name.lower())
    }
    for pattern in patterns:
        wanted = re.compile(rf"(?:^|/)(?:{pattern.replace('{}', SPLITS[split])})$")
        found = [path for path, stem in stems.items() if wanted.search(_SHARD.sub("", stem))]
        if len({_SHARD.sub("", stems[path]) for path in found}) > 1 or (
            len(found) > 1 and not all(_SHARD.search(stems[path]) for path in found)
        ):
            named = ", ".join(str(path.relative_to(folder)) for path in found)
            raise DataError(f"{folder}: which of these is meant? leave one there: {named}")
        if found:
            return found
    return []


def find_task_files(folder: Path, task: PaperTask, split: Split) -> list[Path]:
    """The files of a task's split below a folder; none, where there are none.

    Raises:
        DataError: The folder is none, or several files could be meant.
    """
    return find_files(folder, task.files, split)


def read_docs(task: PaperTask, paths: Sequence[Path], limit: int | None = None) -> list[Doc]:
    """The documents of a task's files.

    A file NAME-labels.lst beside NAME.jsonl has its labels, a line each (PIQA's release).

    Args:
        task: The task.
        paths: Its files, from `find_task_files`.
        limit: Documents to read at most.

    Raises:
        DataError: A file cannot be read, or a row is not laid out as the task's.
    """
    docs: list[Doc] = []
    for path in paths:
        labels = _labels_beside(path)
        is_xml = path.suffix.lower() == ".xml"
        for number, (place, row) in enumerate(
            read_winograd_xml(path) if is_xml else read_rows(path)
        ):
            if limit is not None and len(docs) >= limit:
                return docs[:limit]
            if labels is not None and "label" not in row:
                if number >= len(labels):
                    raise DataError(f"{place}: expected a label for each row, found {len(labels)}")
                row = {**row, "label": labels[number]}
            try:
                docs += task.read(row, place)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                raise DataError(
                    f"{place}: not laid out as {task.title}'s rows: {error!r}"
                ) from None
    if not docs:
        raise DataError(f"{', '.join(map(str, paths))}: no rows")
    return docs[:limit]


def _labels_beside(path: Path) -> list[str] | None:
    beside = path.with_name(f"{path.name.partition('.')[0]}-labels.lst")
    return beside.read_text(encoding="utf-8").split() if beside.exists() else None
