"""From what a user calls a model, an adapter among it, to the base and the adapter upon it."""

from os import PathLike
from pathlib import Path
from typing import Any

from opt_core.adapters.settings import CONFIG_FILE
from opt_core.adapters.tensors import AdapterFolder, is_adapter, read_adapter
from opt_core.errors import CheckpointError
from opt_core.hub import resolve

_CARD = "README.md"
_SHOWN = 8


def split_adapter(
    path: Path, adapter: str | PathLike[str] | None = None, **hub: Any
) -> tuple[Path, AdapterFolder | None]:
    """Where the weights of a model are, and the adapter that is to be merged into them.

    A folder with an adapter_config.json is an adapter's, whatever else is in it, as in
    `transformers`; the weights are those of the model that the configuration names.

    Args:
        path: A model on disk: a folder or file, of a whole model or of an adapter.
        adapter: An adapter (folder or hub id) for a whole model.
        **hub: As in `opt_core.hub.resolve`; `revision` and `subfolder` are those of `path`.

    Raises:
        CheckpointError: The adapter's model cannot be had, or the adapter is no such folder.
    """
    hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
    folder = path if path.is_dir() else path.parent
    if adapter is not None:
        found = resolve(adapter, **hub)
        if not is_adapter(found):
            raise CheckpointError(f"{found}: no {CONFIG_FILE}; expected the folder of an adapter")
        if is_adapter(path):
            raise CheckpointError(f"{folder}: an adapter itself; merge it first (opt-lm convert)")
        return path, read_adapter(found if found.is_dir() else found.parent)
    if not is_adapter(path):
        _check_not_above(path)
        return path, None
    read = read_adapter(folder)
    return _base(read, hub), read


def tokenizer_folder(path: Path, adapter: str | PathLike[str] | None = None, **hub: Any) -> Path:
    """Where the tokenizer of a model is: in the adapter's folder if there is one, else its own.

    Args:
        path: A model on disk, whole or an adapter.
        adapter: An adapter for a whole model.
        **hub: As in `opt_core.hub.resolve`.
    """
    if adapter is not None:
        hub = {key: value for key, value in hub.items() if key not in ("revision", "subfolder")}
        found = resolve(adapter, **hub)
        return found if _has_tokenizer(found) else path
    if not is_adapter(path) or _has_tokenizer(path):
        return path
    return split_adapter(path, **hub)[0]


def _check_not_above(path: Path) -> None:
    """Says which folders are adapters', where PEFT or a trainer wrote nothing else into one."""
    if not path.is_dir() or any(file.is_file() and file.name != _CARD for file in path.iterdir()):
        return
    if found := sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}")):
        names = ", ".join(found[:_SHOWN])
        raise CheckpointError(f"{path}: no model, but adapters in {names}; name one of these")


def _has_tokenizer(path: Path) -> bool:
    folder = path if path.is_dir() else path.parent
    return any((folder / name).exists() for name in ("vocab.json", "tokenizer.json"))


def _base(adapter: AdapterFolder, hub: dict[str, Any]) -> Path:
    settings = adapter.settings
    if not settings.base:
        raise CheckpointError(
            f"{settings.path}: no base_model_name_or_path; load the model it belongs to, with "
            "adapter= (on the command line --adapter) this folder"
        )
    on_disk = Path(settings.base).expanduser().exists()
    try:
        base = resolve(settings.base, revision=None if on_disk else settings.revision, **hub)
    except CheckpointError as error:
        raise CheckpointError(
            f"{settings.path}: base_model_name_or_path: {error}; or load the model from elsewhere, "
            "with adapter= (on the command line --adapter) this folder"
        ) from None
    if is_adapter(base) and not base.samefile(settings.path.parent):
        raise CheckpointError(
            f"{settings.path}: base_model_name_or_path: {base} is an adapter too; merge that one "
            "first (opt-lm convert)"
        )
    return base
