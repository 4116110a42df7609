"""A folder without weights: what is there instead, and what to do with it."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from opt_core.errors import CheckpointError, MissingFileError

_SHARDS = ("*-of-*.safetensors", "*-of-*.bin")
_CONVERTIBLE = (
    "tf_model*.h5*", "flax_model*.msgpack*", "*.pt", "*.pth", "*.ckpt", "*.weights.h5",
    "pytorch_model_fsdp.bin", "pytorch_model*_[0-9]*", "global_step*", "*.distcp",
)  # fmt: skip
_OTHERS = re.compile(
    r"(?!adapter_|training_args|optimizer|scheduler|random_states|scaler|pytorch_model_fsdp)"
    r"[\w.-]+\.(safetensors|bin)"
)
_FOREIGN = {
    ".gguf": "llama.cpp's", ".onnx": "ONNX", ".ort": "ONNX Runtime's", ".ot": "Rust's",
    ".tflite": "LiteRT's", ".engine": "TensorRT's", ".mlmodel": "Core ML's", ".xml": "OpenVINO's",
}  # fmt: skip
"""Kinds of files that are not read: programs, or weights rounded for one program."""
_OF_TRAINERS = ("latest", ".metadata", "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin")
_MAX_ENTRIES = 1000
_SHOWN = 8


def no_weights(folder: Path, names: Collection[str]) -> CheckpointError:
    """The error for a folder that holds none of the weight files of these names."""
    if shard := next((p.name for pattern in _SHARDS for p in folder.glob(pattern)), None):
        return CheckpointError(
            f"{folder}: {shard} is there, but the index of its shards is missing"
        )
    advice = "".join(f"; {hint}" for hint in _hints(folder, names))
    return MissingFileError(f"{folder}: no weights; expected one of {', '.join(names)}{advice}")


def _hints(folder: Path, names: Collection[str]) -> Iterator[str]:
    if adapter := next((path.name for path in folder.glob("adapter_*")), None):
        yield f"{adapter} is of an adapter: load the model that it is for, then add it"
    found = sorted({path.name for pattern in _CONVERTIBLE for path in folder.glob(pattern)})
    if found:
        yield f"found {', '.join(found[:_SHOWN])}: `opt-lm convert` reads these"
    files = [*_some(folder), *folder.glob("onnx/*.onnx")]
    if foreign := sorted(path for path in files if path.suffix in _FOREIGN):
        first = foreign[0].relative_to(folder).as_posix()
        kind = _FOREIGN[foreign[0].suffix]
        yield f"{first} is {kind} format, which is not read: take the model it was made from"
    alone = sorted(path.name for path in _some(folder) if _OTHERS.fullmatch(path.name))
    if alone:
        yield f"found {', '.join(alone[:_SHOWN])}: give the path of the file if it is the model"
    if inner := _folders_with_weights(folder, names):
        more = f", as in {len(inner) - 1} others" if len(inner) > 1 else ""
        yield f"weights are in {inner[-1]}{more}: give that folder"


def _some(folder: Path) -> list[Path]:
    return [path for path, _ in zip(folder.iterdir(), range(_MAX_ENTRIES), strict=False)]


def _folders_with_weights(folder: Path, names: Collection[str]) -> list[str]:
    """Those in it, the last one of a training run at the end."""
    there = (*names, *_OF_TRAINERS)
    found = [p.name for p in _some(folder) if any((p / name).exists() for name in there)]

    def by_number(name: str) -> tuple[int, str]:
        digits = re.search(r"\d{1,18}$", name)
        return (int(digits[0]) if digits else -1), name

    return sorted(found, key=by_number)
