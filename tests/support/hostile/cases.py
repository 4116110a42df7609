"""A case of the corpus: a sound checkpoint's format, and a function that damages it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 5
MEMORY = 1 << 30

Damage = Callable[[Path], Any]
FILES = {
    "safetensors": "model.safetensors",
    "torch-bin": "pytorch_model.bin",
    "tf-h5": "tf_model.h5",
    "flax-msgpack": "flax_model.msgpack",
    "metaseq": "reshard.pt",
    "keras-hub": "model.weights.h5",
}
CORPUS: dict[str, tuple[str | None, Damage]] = {}
"""Name -> the format of the sound checkpoint to start from (None: an empty folder), the damage."""


def used() -> float:
    """Seconds of processor, children's too: a wait for the disk is no loop."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def case(name: str, start: str | None = None) -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        assert name not in CORPUS
        CORPUS[name] = (start, damage)
        return damage

    return add


def cut(file: str, keep: float | int) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        size = int(keep * len(data)) if isinstance(keep, float) else keep
        (folder / file).write_bytes(data[: size if size >= 0 else len(data) + size])

    return damage


for kind, file in FILES.items():
    for keep in (0, 4, 9, 40, 0.1, 0.5, 0.9, -30, -1):
        if kind != "keras-hub":  # HDF5 like tf-h5
            CORPUS[f"{kind} cut to {keep}"] = (kind, cut(file, keep))


def replace(file: str, old: bytes, new: bytes) -> Damage:
    def damage(folder: Path) -> None:
        data = (folder / file).read_bytes()
        assert old in data
        (folder / file).write_bytes(data.replace(old, new, 1))

    return damage


def overwrite(file: str, data: bytes) -> Damage:
    return lambda folder: (folder / file).write_bytes(data)
