"""Arguments of `transformers`' `save_pretrained`: honoured, without effect, or refused by name."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.checkpoints.load import canonical_name
from opt_core.errors import ArgumentError, CheckpointError
from opt_core.json_files import read_json, write_json
from opt_core.params import ParamSpec

_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?(\.(?:safetensors|bin)(?:\.index\.json)?)"
)
_WITHOUT_EFFECT = (
    *("save_function", "save_peft_format", "save_original_format", "version"),
    "distributed_checkpoint",
)
_HUB = ("token", "private", "commit_message", "revision", "create_pr", "tags")
_HANDLED = (
    *("save_directory", "is_main_process", "state_dict", "push_to_hub", "repo_id", "variant"),
    *("safe_serialization", "saved_model", "signatures", "use_auth_token", "commit_description"),
)


@dataclass(frozen=True)
class SaveOptions:
    """The arguments of a call of `save_pretrained` beside the backend's own.

    Attributes:
        folder: Where to.
        max_shard_size: Most bytes of tensors per file.
        writes: Whether this process writes (`is_main_process`).
        state_dict: Values in place of the model's, by name, or None.
        is_safe: Whether to write safetensors (`safe_serialization`).
        saved_model: Whether TensorFlow writes a SavedModel too.
        signatures: Those of the SavedModel, or None.
        repository: The repository to upload to, or None.
        hub: Arguments of the upload.
        variant: Part of the names of weight files, such as "fp16", or None.
    """

    folder: Path
    max_shard_size: str | int
    writes: bool = True
    state_dict: Mapping[str, Any] | None = None
    is_safe: bool = True
    saved_model: bool = False
    signatures: Any = None
    repository: str | None = None
    hub: dict[str, Any] = field(default_factory=dict[str, Any])
    variant: str | None = None

    def write(self, save: Callable[["SaveOptions"], None]) -> None:
        """Calls what writes a folder; weights of a variant get its name, and others' stay.

        Args:
            save: Writes the folder of the options that it is given.
        """
        if not self.variant:
            save(self)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.folder) as stage:
            save(replace(self, folder=Path(stage), variant=None))
            names = {path.name for path in Path(stage).iterdir()}
            for name in names:
                new = _varied(name, self.variant)
                if name.endswith(".index.json"):
                    _vary_index(Path(stage, name), self.variant)
                Path(stage, name).replace(self.folder / new)

    def values(
        self,
        fetch: Callable[[ParamSpec], NDArray[Any]],
        as_array: Callable[[Any], NDArray[Any]] = np.asarray,
    ) -> Callable[[ParamSpec], NDArray[Any]]:
        """Where the values of parameters come from: the `state_dict` if there is one.

        Args:
            fetch: Gives the model's.
            as_array: Turns a tensor of the `state_dict` into an array.
        """
        if self.state_dict is None:
            return fetch
        held = {canonical_name(name): value for name, value in self.state_dict.items()}

        def given(spec: ParamSpec) -> NDArray[Any]:
            if spec.name not in held:
                raise CheckpointError(f"state_dict: {spec.name} is missing")
            return as_array(held[spec.name])

        return given


def read_saving(
    folder: str | PathLike[str] | None, max_shard_size: str | int, arguments: Mapping[str, Any]
) -> SaveOptions:
    """Sorts the arguments of `save_pretrained`.

    Args:
        folder: Where to; None: the arguments have it under `transformers`' name.
        max_shard_size: As in `opt_core.checkpoints.save.save_checkpoint`.
        arguments: Names and values.

    Raises:
        ArgumentError: One is unknown, or cannot be honoured; what to do instead is named.
    """
    for name in arguments:
        known = (*_HANDLED, *_HUB, *_WITHOUT_EFFECT)
        if name not in known:
            near = difflib.get_close_matches(name, ("max_shard_size", *known), 1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
            raise ArgumentError(f"save_pretrained: unknown argument {name!r}; {hint}")
    path = folder if folder is not None else arguments.get("save_directory")
    if path is None:
        raise ArgumentError("save_pretrained: expected a folder")
    hub = {name: arguments[name] for name in _HUB if arguments.get(name) is not None}
    if arguments.get("use_auth_token") is not None:
        hub.setdefault("token", arguments["use_auth_token"])
    wanted = arguments.get("push_to_hub") and arguments.get("is_main_process", True)
    return SaveOptions(
        folder=Path(path),
        max_shard_size=max_shard_size,
        writes=bool(arguments.get("is_main_process", True)),
        state_dict=arguments.get("state_dict"),
        is_safe=arguments.get("safe_serialization") is not False,
        saved_model=bool(arguments.get("saved_model")),
        signatures=arguments.get("signatures"),
        repository=(arguments.get("repo_id") or Path(path).name) if wanted else None,
        hub=hub,
        variant=arguments.get("variant"),
    )


def _varied(name: str, variant: str) -> str:
    """A weight file's name with the variant in it; another file's as it is."""
    match = _WEIGHTS.fullmatch(name)
    if match is None:
        return name
    stem, shard, end = match.groups()
    if end.endswith(".json"):
        return f"{stem}{end.removesuffix('.json')}.{variant}.json"
    return f"{stem}.{variant}{shard or ''}{end}"


def _vary_index(path: Path, variant: str) -> None:
    index = read_json(path)
    files = {name: _varied(file, variant) for name, file in index["weight_map"].items()}
    write_json(path, index | {"weight_map": files})


def refuse_unsafe(options: SaveOptions, to: str) -> None:
    """Refuses another format than safetensors where it is another program's to write.

    Args:
        options: The call's.
        to: The format's name for `opt-lm convert`.

    Raises:
        ArgumentError: safetensors is not wanted.
    """
    if not options.is_safe:
        raise ArgumentError(
            "save_pretrained: safe_serialization=False is not supported here; save as it is, then "
            f"opt-lm convert {options.folder} NEW_FOLDER --to {to}"
        )


def refuse_of_quantized(options: SaveOptions) -> None:
    """Refuses what the files of quantised weights cannot be.

    Args:
        options: The call's.

    Raises:
        ArgumentError: Other values, other files, or other names are asked for.
    """
    for name, is_given in {
        "state_dict": options.state_dict is not None,
        "safe_serialization=False": not options.is_safe,
        "saved_model": options.saved_model,
        "variant": options.variant is not None,
    }.items():
        if is_given:
            raise ArgumentError(f"save_pretrained: {name} is not supported with quantised weights")
