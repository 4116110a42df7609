"""JSON files: one reader, which says in one line what is wrong, and one writer."""

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from opt_core.errors import ConfigError, OPTError

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""The beginning of what is in the place of a large file that Git LFS has not fetched."""


def read_json(path: Path, failure: type[OPTError] = ConfigError) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: The file.
        failure: What to raise.

    Raises:
        failure: It is missing, not JSON, or holds something else than an object.
    """
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise failure(f"{path}: no such file") from None
    except OSError as error:
        raise failure(f"{path}: {error.strerror or error}") from None
    return parse_json_object(text, path, failure)


def parse_json_object(
    text: bytes | str,
    source: str | PathLike[str],
    failure: type[OPTError],
    *,
    unique_keys: bool = False,
) -> dict[str, Any]:
    """The object that a JSON text is.

    Args:
        text: UTF-8, if bytes.
        source: The file it is from, for messages.
        failure: What to raise.
        unique_keys: Refuse a key that occurs twice, where one entry would hide another.

    Raises:
        failure: It is not JSON, not an object, or repeats a key.
    """
    values = parse_json(text, source, failure, unique_keys=unique_keys)
    if not isinstance(values, dict):
        raise failure(f"{source}: expected a JSON object, received {type(values).__name__}")
    return cast("dict[str, Any]", values)


def parse_json(
    text: bytes | str,
    source: str | PathLike[str],
    failure: type[OPTError],
    *,
    unique_keys: bool = False,
) -> Any:
    """The value that a JSON text is; arguments as for `parse_json_object`.

    Raises:
        failure: It is empty, not JSON, or repeats a key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise failure(f"{source}: {repeated!r} occurs twice; the file is damaged")
        return values

    if not text.strip():
        raise failure(f"{source}: not valid JSON: the file is empty")
    if text[: len(LFS_POINTER)] in (LFS_POINTER, LFS_POINTER.decode()):
        raise failure(
            f"{source}: a Git LFS pointer, not the file; run `git lfs pull` in its folder"
        )
    try:
        return json.loads(text, object_pairs_hook=unique if unique_keys else None)
    except OPTError:
        raise
    except (ValueError, RecursionError) as error:
        raise failure(f"{source}: not valid JSON: {error}") from None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object beside its place, then renames it there: no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)
