"""vocab.json and merges.txt: byte-level BPE's vocabulary, and what becomes of which pair."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from opt_core.errors import TokenizerError


def check_vocabulary(vocabulary: Mapping[str, Any], path: Path) -> None:
    """Refuses a vocabulary whose ids are none, or are given twice."""
    seen: dict[int, str] = {}
    for token, index in vocabulary.items():
        if type(index) is not int or not 0 <= index < 2**31:
            raise TokenizerError(f"{path}: {token!r}: expected an id >= 0, received {index!r}")
        if index in seen:
            raise TokenizerError(
                f"{path}: id {index} belongs to both {seen[index]!r} and {token!r}"
            )
        seen[index] = token
    if not seen:
        raise TokenizerError(f"{path}: no tokens")


def read_merges(path: Path, vocabulary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Reads merges.txt.

    Raises:
        TokenizerError: It is damaged, or merges what the vocabulary lacks.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path}: not readable as text: {error}") from None
    return parse_merges(lines, vocabulary, path)


def parse_merges(
    lines: Iterable[str], vocabulary: Mapping[str, Any], path: Path
) -> list[tuple[str, str]]:
    """Reads the lines of merges.txt: two tokens each, a space between them.

    Raises:
        TokenizerError: A line is none, or merges what the vocabulary lacks.
    """
    merges: list[tuple[str, str]] = []
    for number, line in enumerate(lines, start=1):
        if line.startswith("#version") or not line.strip():
            continue
        left, _, right = line.rstrip("\r").partition(" ")
        if not left or not right or " " in right:
            raise TokenizerError(f"{path}: line {number}: expected two tokens, received {line!r}")
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise TokenizerError(f"{path}: line {number}: {token!r} is not in vocab.json")
        merges.append((left, right))
    if not merges:
        raise TokenizerError(f"{path}: no merges; the file is empty or cut short")
    return merges


def write_merges(path: Path, merges: list[Any]) -> None:
    """Writes merges.txt, whole or not at all."""
    lines = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]
    part = path.with_name(f".{path.name}.tmp")
    part.write_text("\n".join(["#version: 0.2", *lines, ""]), encoding="utf-8")
    part.replace(path)
