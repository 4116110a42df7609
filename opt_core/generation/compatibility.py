"""Settings of generation as `transformers` keeps them: its names, files and methods."""

import dataclasses
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from opt_core.compatibility.config_keys import COMMON
from opt_core.compatibility.loading import HUB
from opt_core.compatibility.upload import UploadMixin
from opt_core.errors import ConfigError, GenerationError
from opt_core.generation.limits import REFUSED, check_heeded, check_settings
from opt_core.json_files import read_json, write_json

FILE = "generation_config.json"

WITHOUT_EFFECT: Mapping[str, Any] = {
    "_from_model_config": False, "transformers_version": None, "cache_implementation": None,
    "cache_config": None, "max_cache_len": None, "return_legacy_cache": None,
    "decoder_start_token_id": None, "is_assistant": False, "disable_compile": None,
    "num_assistant_tokens_schedule": "constant", "assistant_confidence_threshold": 0.4,
    "assistant_ensemble_weight": None, "assistant_lookbehind": 10, "target_lookbehind": 10,
    "compile_config": None, "continuous_batching_config": None, "generation_kwargs": {},
    "low_memory": None, "synced_gpus": False, "use_model_defaults": None, "use_mtp": False,
    "speculation_type": None, "renormalize_scores": None, "cache_position": None, "trace": None,
}  # fmt: skip
"""Settings of `transformers` that change no text of these models, and their defaults."""

CACHES = (
    *("dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "quantized", "hybrid"),
    *("sliding_window", "hybrid_chunked", "offloaded_hybrid", "paged", "mamba"),
)
"""Names that `cache_implementation` may have; there is one cache here whatever it says."""

_OF_A_CALL = (
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"),
    *("assistant_model", "negative_prompt_ids", "negative_prompt_attention_mask"),
)
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
_WHERE = ("cache_dir", *HUB, "proxies", "resume_download", "use_auth_token", "_from_auto")


class Items(tuple[Any, ...]):
    """Several values of a setting: they cannot change, and equal a list of the same."""

    __slots__ = ()

    def __hash__(self) -> int:
        return super().__hash__()

    def __eq__(self, other: object) -> bool:
        same = tuple(cast("list[Any]", other)) if isinstance(other, list) else other
        return super().__eq__(same)

    def __ne__(self, other: object) -> bool:
        return not self == other


def check_cache_name(value: Any) -> None:
    """Refuses a `cache_implementation` that `transformers` does not have."""
    if value not in (None, *CACHES):
        raise GenerationError(
            f"cache_implementation: expected one of {', '.join(CACHES)}, received {value!r}"
        )


class SettingsMethods(UploadMixin):
    """`GenerationConfig`'s part that is `transformers`' way of doing things with settings."""

    others: tuple[tuple[str, Any], ...]
    refused: tuple[tuple[str, str], ...]

    def __getattr__(self, name: str) -> Any:
        """A setting that `transformers` has and that has no effect here, or was only kept."""
        if name.startswith("__") or name == "others":
            raise AttributeError(name)
        kept = dict(self.others)
        if name in kept:
            return kept[name]
        if name in WITHOUT_EFFECT:
            return WITHOUT_EFFECT[name]
        if name in REFUSED:
            return REFUSED[name][0]
        raise AttributeError(f"{type(self).__name__} has no setting {name!r}")

    def keep(self, name: str, value: Any, line: str) -> None:
        """Keeps a setting that is no field.

        Args:
            name: Its name.
            value: Its value; None forgets it.
            line: What `generate` says of it; empty: nothing.
        """
        if name in _OF_A_CALL:
            raise GenerationError(f"{name} is no setting: pass it to generate")
        if name == "cache_implementation":
            check_cache_name(value)
        lines = [pair for pair in self.refused if pair[0] != name]
        rest = [pair for pair in self.others if pair[0] != name]
        vars(self)["refused"] = (*lines, *([(name, line)] if line else []))
        vars(self)["others"] = (*rest, *([] if value is None else [(name, value)]))

    @classmethod
    def from_any(cls, settings: Any) -> Self:
        """Settings of whatever a caller has.

        Args:
            settings: Settings, which are returned themselves; those of `transformers`, or a dict.

        Raises:
            GenerationError: It is something else.
        """
        if isinstance(settings, cls):
            return settings
        given = settings.to_diff_dict() if hasattr(settings, "to_diff_dict") else settings
        if not isinstance(given, Mapping):
            kind = type(settings).__name__
            raise GenerationError(
                f"generation_config: expected a GenerationConfig, received {kind}"
            )
        return cls.from_dict(cast("Mapping[str, Any]", given))

    @classmethod
    def from_model_config(cls, model_config: Any) -> Self:
        """The defaults of a model without generation_config.json.

        They are its special ids and what its configuration says of generation, as configurations
        did before there was that file; otherwise greedy search.

        Args:
            model_config: An `OPTConfig`.
        """
        known = {field.name for field in dataclasses.fields(cast(Any, cls))} | REFUSED.keys()
        known &= COMMON.keys()
        held = cast("dict[str, Any]", vars(model_config))
        said = {name: value for name, value in held.items() if name in known}
        ids = {name: getattr(model_config, name) for name in _SPECIAL}
        return cls.from_dict(said | ids)

    from_model = from_model_config

    if TYPE_CHECKING:  # `GenerationConfig` has them

        @classmethod
        def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
            """Settings by name."""

        def to_diff_dict(self) -> dict[str, Any]:
            """The settings that differ from the defaults."""
            ...

        def to_dict(self) -> dict[str, Any]:
            """All settings by name."""
            ...

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str] | None = None,
        config_file_name: str | None = None,
        return_unused_kwargs: bool = False,
        **arguments: Any,
    ) -> Any:
        """Reads generation_config.json from a folder or a hub repository.

        What it asks for that cannot be honoured, `generate` refuses: weights load all the same.

        Args:
            folder: The folder or hub id; `pretrained_model_name` is another name of it.
            config_file_name: Another name of the file.
            return_unused_kwargs: Return the arguments that are neither settings nor the hub's too.
            **arguments: Those of `opt_core.hub.resolve`, and settings in place of the file's.

        Raises:
            ConfigError: It is not a JSON object, or is not there.
        """
        from opt_core.hub import resolve  # huggingface_hub is imported only when it is needed

        place = arguments.pop("pretrained_model_name", folder)
        where = {name: arguments.pop(name) for name in _WHERE if name in arguments}
        fields = {field.name for field in dataclasses.fields(cast(Any, cls))}
        changes = {name: arguments.pop(name) for name in fields & arguments.keys()}
        if arguments and not return_unused_kwargs:
            raise ConfigError(f"from_pretrained: unknown argument {next(iter(arguments))!r}")
        name = config_file_name or FILE
        if place is None:
            raise ConfigError("from_pretrained: expected a folder or hub id")
        hub = {name: where[name] for name in HUB if where.get(name) is not None}
        home = Path(place) if Path(place).is_dir() else resolve(place, files=(name,), **hub)
        path = home / hub.get("subfolder", "") / name if home.is_dir() else home
        values = read_json(path)
        try:
            found = cls.from_dict(values)
        except GenerationError as error:  # a bad value: nothing but the ids can be trusted
            ids: dict[str, Any] = {
                k: v for k, v in values.items() if k in _SPECIAL and type(v) is int
            }
            found = cls.from_dict(ids | {"refused": (("", str(error)),)})
        found.refused = tuple((name, f"{path}: {line}") for name, line in found.refused)
        found = found.replace(**changes) if changes else found
        return (found, arguments) if return_unused_kwargs else found

    def save_pretrained(
        self,
        folder: str | PathLike[str] | None = None,
        config_file_name: str | None = None,
        push_to_hub: bool = False,
        save_directory: str | PathLike[str] | None = None,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Writes generation_config.json into a folder, only what differs from the defaults.

        Args:
            folder: The folder, made if missing.
            config_file_name: Another name of the file.
            push_to_hub: Upload it, too.
            save_directory: The folder under `transformers`' name for it.
            repo_id: The repository to upload to; None: the folder's name.
            **hub: `token`, `private` and so on, as `push_to_hub` takes them.

        Raises:
            GenerationError: Settings out of range, or that contradict one another.
        """
        path = Path(cast(Any, save_directory if folder is None else folder))
        self.validate(strict=True)
        write_json(path / (config_file_name or FILE), self.to_diff_dict())
        if push_to_hub:
            self.push_to_hub(repo_id or path.name, **hub)

    def to_json_string(self, use_diff: bool = True, ignore_metadata: bool = False) -> str:
        """The settings as JSON.

        Args:
            use_diff: Only those that differ from the defaults.
            ignore_metadata: Leave `transformers_version` out.
        """
        values = self.to_diff_dict() if use_diff else self.to_dict()
        if ignore_metadata:
            values.pop("transformers_version", None)
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(
        self, json_file_path: str | PathLike[str], use_diff: bool = True, **_: Any
    ) -> None:
        """Writes `to_json_string` into a file."""
        Path(json_file_path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def update(
        self, defaults_only: bool = False, allow_custom_entries: bool = False, **settings: Any
    ) -> dict[str, Any]:
        """Sets those that there are; returns the others, as `transformers` does.

        Args:
            defaults_only: Leave alone what differs from its default.
            allow_custom_entries: Keep names that are no settings, too.
            **settings: Names and values.
        """
        fields = {field.name for field in dataclasses.fields(cast(Any, self))}
        known = {*fields, *WITHOUT_EFFECT, *REFUSED, *(settings if allow_custom_entries else ())}
        changed = self.to_diff_dict() if defaults_only else {}
        for name in [name for name in settings if name in known]:
            value = settings.pop(name)
            if name not in changed:
                setattr(self, name, value)
        self.validate()
        return settings

    def validate(self, strict: bool = False, **_: Any) -> None:
        """Checks the values.

        Args:
            strict: Refuse what has no effect, too.

        Raises:
            GenerationError: One is out of range, or two contradict one another.
        """
        check_settings(cast(Any, self))
        if strict:
            check_heeded(cast(Any, self))

    def get_generation_mode(self, assistant_model: Any = None) -> str:
        """The name of the search, as `transformers`' `GenerationMode` has it.

        Args:
            assistant_model: A model that drafts, or None.
        """
        settings: Any = self
        if settings.num_beams > 1:
            if settings.num_beam_groups > 1:
                return "group_beam_search"
            return "beam_sample" if settings.do_sample else "beam_search"
        if settings.penalty_alpha:
            return "contrastive_search"
        if assistant_model is not None or settings.prompt_lookup_num_tokens:
            return "assisted_generation"
        return "sample" if settings.do_sample else "greedy_search"
