"""The files that go with the weights: tokenizer, generation settings, licence."""

import shutil
from pathlib import Path

from opt_core.errors import CheckpointError, TokenizerError
from opt_core.hub import TOKENIZER_FILES
from opt_core.json_files import write_json
from opt_core.text import tokenizer_files

_COPIED = ("generation_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt")
_TOKENIZERS = ("vocab.json", "tokenizer.json")
_METASEQ = {"vocab.json": "gpt2-vocab.json", "merges.txt": "gpt2-merges.txt"}
_KERAS_ASSETS = {"vocab.json": "vocabulary.json", "merges.txt": "merges.txt"}
_ASSETS = Path("assets") / "tokenizer"
_MAX_SIZE = 1 << 28


def copy_sidecar_files(
    source: Path, destination: Path, keras_hub: bool = False, adapter: Path | None = None
) -> None:
    """Copies what goes with the weights, and writes tokenizer.json where there is none.

    Args:
        source: Folder of the checkpoint.
        destination: Folder of the new one; must exist.
        keras_hub: Whether the new one is laid out as KerasHub wants it.
        adapter: Folder of an adapter, whose tokenizer comes first if it has one.

    Raises:
        TokenizerError: The tokenizer's files contradict one another.
        CheckpointError: A file cannot be copied, or is a link out of the folder.
    """
    try:
        for name in _COPIED:
            _copy(source, name, destination / name)
        if adapter is not None and any((adapter / name).exists() for name in _TOKENIZERS):
            source = adapter
        for name in () if is_keras_hub(source) else TOKENIZER_FILES:
            _copy(source, name, destination / name)
        for ours, keras in _KERAS_ASSETS.items():
            _copy(source, _ASSETS / keras, destination / ours)
        if not any((destination / name).exists() for name in _TOKENIZERS):
            for ours, theirs in _METASEQ.items():
                _copy(source, theirs, destination / ours)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be copied: {error.strerror or error}") from None
    if (destination / "vocab.json").exists() and not (destination / "tokenizer.json").exists():
        tokenizer = _load(source, destination)
        scratch = destination / ".tokenizer"
        tokenizer_files.save(tokenizer, scratch)
        for path in scratch.iterdir():
            if not (destination / path.name).exists():
                path.rename(destination / path.name)
        shutil.rmtree(scratch)
    if keras_hub:
        _arrange_for_keras_hub(destination)


def _load(source: Path, copied: Path) -> tokenizer_files.LoadedTokenizer:
    try:
        return tokenizer_files.load(copied)
    except TokenizerError as error:
        raise TokenizerError(str(error).replace(str(copied), str(source))) from None


def is_keras_hub(source: Path) -> bool:
    """Whether a folder is laid out as KerasHub's presets, whose tokenizer.json is another."""
    return (source / "assets").is_dir() or (source / "metadata.json").is_file()


def _copy(folder: Path, name: str | Path, new: Path) -> None:
    source = folder / name
    if source.is_file():
        if source.stat().st_size > _MAX_SIZE:
            raise CheckpointError(f"{source}: expected at most {_MAX_SIZE} bytes")
        if not _is_part_of(folder, source):
            raise CheckpointError(f"{source}: a link out of its folder; put a copy there instead")
        shutil.copyfile(source, new)


def _is_part_of(folder: Path, path: Path) -> bool:
    """Whether a file came with the checkpoint: a link could name any file, to be published."""
    roots = [folder.resolve()]
    if roots[0].parent.name == "snapshots":  # the hub's cache is links to ../../blobs
        roots.append(roots[0].parent.parent / "blobs")
    return any(path.resolve().is_relative_to(root) for root in roots)


def _arrange_for_keras_hub(folder: Path) -> None:
    """KerasHub's names: its tokenizer.json is its own, the vocabulary is an asset."""
    has_vocabulary = (folder / "vocab.json").exists() and (folder / "merges.txt").exists()
    if has_vocabulary:
        (folder / _ASSETS).mkdir(parents=True)
        for ours, keras in _KERAS_ASSETS.items():
            (folder / ours).rename(folder / _ASSETS / keras)
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    if has_vocabulary:
        write_json(
            folder / "tokenizer.json",
            {
                "module": "keras_hub.src.models.opt.opt_tokenizer",
                "class_name": "OPTTokenizer",
                "config": {"name": "opt_tokenizer", "trainable": True, "dtype": "int32"},
                "registered_name": "keras_hub>OPTTokenizer",
            },
        )
