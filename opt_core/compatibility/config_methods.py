"""Methods and attributes that code written for `transformers` expects of a configuration."""

import copy
import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from opt_core.compatibility.config_keys import ALIASES, COMMON
from opt_core.compatibility.upload import UploadMixin
from opt_core.errors import ArgumentError, ConfigError
from opt_core.json_files import read_json, write_json

_SWITCH = {"true": True, "1": True, "yes": True, "y": True, "false": False, "0": False, "no": False}
_ALWAYS = ("model_type", "transformers_version")
_SHOWN = ("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "num_attention_heads")


class ConfigMethods(UploadMixin):
    """`OPTConfig`'s part that is `transformers`' way of doing things with a configuration."""

    model_type: ClassVar[str] = "opt"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {}
    is_composition: ClassVar[bool] = False
    has_no_defaults_at_init: ClassVar[bool] = False
    base_config_key: ClassVar[str] = ""
    sub_configs: ClassVar[dict[str, Any]] = {}
    base_model_tp_plan: ClassVar[Any] = None
    base_model_pp_plan: ClassVar[Any] = None
    base_model_ep_plan: ClassVar[Any] = None
    base_model_fsdp_plan: ClassVar[Any] = None
    is_heterogeneous: ClassVar[bool] = False
    default_theta: ClassVar[float] = 10000.0
    _auto_class: ClassVar[Any] = None
    id2label: Any
    return_dict: bool

    def __getattr__(self, name: str) -> Any:
        """An attribute that `transformers`' configurations have and this one was not given."""
        if name == "label2id":
            return {label: i for i, label in self.id2label.items()}
        known = ALIASES.get(name, name)
        if known != name:
            return getattr(self, known)
        if name in COMMON:
            return COMMON[name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def use_return_dict(self) -> bool:
        """Whether calls return an output with names."""
        return self.return_dict and not self.torchscript

    @property
    def per_layer_config(self) -> list[Self]:
        """Each layer's configuration: they are alike."""
        count: int = cast(Any, self).num_hidden_layers
        return [self] * count

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Notes the name, as `transformers` does for classes of a user's own."""
        cls._auto_class = getattr(auto_class, "__name__", auto_class)

    @classmethod
    def is_remote_code(cls) -> bool:
        """False: the code is this package's."""
        return False

    is_custom_code = is_remote_code

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | PathLike[str], **arguments: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Contents of a config.json, and the arguments that `from_pretrained` has no use for."""
        found, unused = cls.from_pretrained(
            pretrained_model_name_or_path, return_unused_kwargs=True, **arguments
        )
        return found.to_dict(), unused

    if TYPE_CHECKING:  # `OPTConfig` has it

        @classmethod
        def from_pretrained(cls, path_or_hub_id: Any, **arguments: Any) -> Any:
            """Reads config.json from a folder or a hub repository."""

    @classmethod
    def from_json_file(cls, json_file: str | PathLike[str]) -> Self:
        """Makes a configuration of a JSON file, whatever its name."""
        return cls.from_dict(read_json(Path(json_file)), str(json_file))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config", **changes: Any) -> Any:
        """Makes a configuration from the contents of a config.json."""
        raise NotImplementedError

    def save_pretrained(
        self,
        folder: str | PathLike[str] | None = None,
        push_to_hub: bool = False,
        save_directory: str | PathLike[str] | None = None,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Writes config.json into a folder (made if missing), readable by `transformers`.

        Args:
            folder: The folder.
            push_to_hub: Upload it, too.
            save_directory: The folder under `transformers`' name for it.
            repo_id: The repository to upload to; None: the folder's name.
            **hub: `token`, `private` and so on, as `push_to_hub` takes them.
        """
        path = folder if folder is not None else save_directory
        if path is None:
            raise ArgumentError("save_pretrained: expected a folder")
        self.validate()
        write_json(Path(path) / "config.json", self.to_dict())
        if push_to_hub:
            self.push_to_hub(repo_id or Path(path).name, **hub)

    def validate(self) -> None:
        """Checks every field."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Contents of config.json."""
        raise NotImplementedError

    def to_diff_dict(self) -> dict[str, Any]:
        """Contents of config.json as far as they are not the defaults."""
        default = type(self)().to_dict()
        return {
            name: value
            for name, value in self.to_dict().items()
            if name in _ALWAYS or name not in default or value != default[name]
        }

    def to_json_string(self, use_diff: bool = True) -> str:
        """Contents of config.json as text; with `use_diff`, as far as they are not the defaults."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"

    def to_json_file(self, json_file_path: str | PathLike[str], use_diff: bool = True) -> None:
        """Writes `to_json_string` into a file."""
        Path(json_file_path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def update(self, config_dict: Mapping[str, Any]) -> None:
        """Sets attributes from a mapping."""
        for name, value in config_dict.items():
            setattr(self, name, value)

    def update_from_string(self, update_str: str) -> None:
        """Sets fields from text such as "use_cache=false,dropout=0.2".

        Args:
            update_str: Names and values; a value has the type that the field has.

        Raises:
            ConfigError: A name that is no field, or a value of another type.
        """
        for part in update_str.split(","):
            name, _, text = part.partition("=")
            old: Any = getattr(self, name, None)
            if old is None and not hasattr(type(self), name):
                raise ConfigError(f"update_from_string: {name!r} is no field")
            try:
                setattr(self, name, _parse(old, text))
            except ValueError:
                kind = type(old).__name__
                raise ConfigError(f"{name}: expected a {kind}, received {text!r}") from None

    def get_text_config(self, decoder: bool = False, encoder: bool = False) -> Self:
        """This configuration: OPT is nothing but a language model."""
        return self

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or a default where there is none."""
        return getattr(self, name, default)

    def copy(self) -> Self:
        """An independent copy."""
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        values = {name: getattr(self, name) for name in _SHOWN} | self.to_diff_dict()
        return f"{type(self).__name__} {json.dumps(values, indent=2, sort_keys=True, default=str)}"


def _parse(old: Any, text: str) -> Any:
    """A text as a value of the type that another one has."""
    if isinstance(old, bool):
        if text.lower() not in _SWITCH:
            raise ValueError(text)
        return _SWITCH[text.lower()]
    return type(old)(text) if isinstance(old, int | float) else text
