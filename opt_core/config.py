"""The model's configuration: `transformers`' field names and defaults, validated.

Reading is fail-closed where it matters: a key that changes what OPT computes, or a near miss of a
field, raises instead of being dropped, because a dropped key is how two implementations come to
give different numbers for one checkpoint (`opt_core.compatibility.config_keys`).
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast, get_type_hints

from opt_core.compatibility.config_keys import (
    ALIASES,
    SPELLED_AS,
    check_synonyms,
    is_known,
    near_miss,
    sort_keys,
)
from opt_core.compatibility.config_methods import ConfigMethods
from opt_core.compatibility.loading import read_arguments, sort_arguments
from opt_core.compatibility.notices import notice
from opt_core.config_checks import check_ranges, check_types
from opt_core.config_values import NORMAL, Snapshot, default_labels, labels_by_index
from opt_core.errors import ConfigError, MissingFileError
from opt_core.json_files import read_json
from opt_core.presets import PRESETS

STRUCTURE = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "ffn_dim", "max_position_embeddings"),
    *("do_layer_norm_before", "_remove_final_layer_norm", "word_embed_proj_dim"),
    *("num_attention_heads", "enable_bias", "layer_norm_elementwise_affine"),
)
"""Fields that decide the shape of a decoder."""


@dataclass(init=False, eq=False, repr=False)
class OPTConfig(ConfigMethods):
    """Hyper-parameters of one OPT model.

    Field names, meanings and defaults are those of `transformers.OPTConfig`; the defaults describe
    opt-125m. Fields can be set; they are validated when something is made of them: a model, a file.
    A model's shape does not follow: it says so when it is used. Other attributes that
    `transformers`' configurations have can be read and set too, and further keyword arguments are
    kept as attributes.

    Attributes:
        vocab_size: Rows of the token embedding V. 50272 for OPT (50265 tokens padded to 8).
        hidden_size: Width of the residual stream D.
        num_hidden_layers: Decoder layers N.
        ffn_dim: Width of the feed-forward layer F.
        max_position_embeddings: Longest sequence; the position table has two rows more.
        do_layer_norm_before: Pre-LN (True) or post-LN (False, opt-350m only).
        _remove_final_layer_norm: True for checkpoints fine-tuned without the decoder's last norm.
        word_embed_proj_dim: Width of the token embedding P; None means `hidden_size`.
        dropout: Probability on the outputs of attention and feed-forward, in training.
        attention_dropout: Probability on the attention weights, in training.
        num_attention_heads: Heads H; `hidden_size / num_attention_heads` is the head size K.
        activation_function: "relu", "gelu" (the exact one, erf), "gelu_new", "gelu_pytorch_tanh",
            "silu" or "swish".
        layerdrop: Probability of leaving out a whole layer, in training.
        init_std: Standard deviation of freshly initialised weights.
        use_cache: Whether a call of the model in inference returns a cache.
        pad_token_id: Padding id; its embedding row starts at zero and gets no gradient.
        bos_token_id: First token of every text (the same id as the last one, for OPT).
        eos_token_id: Token that ends a text, or several, as a tuple.
        enable_bias: Whether the linear layers have biases (False: Galactica 30b, 120b).
        layer_norm_elementwise_affine: Whether norms have gamma and beta (False: Galactica 30b,
            120b).
        tie_word_embeddings: Whether the language-model head is the token embedding.
        num_labels: Classes of the sequence-classification head.
        id2label: Class names, by index; by default LABEL_0, LABEL_1, ...
        problem_type: "regression", "single_label_classification", "multi_label_classification", or
            None: inferred from `num_labels` and the labels.
        dtype: Data type the weights are stored in, where the file says so.
        output_attentions: Whether calls return the attention weights unless they say otherwise.
        output_hidden_states: Whether calls return the states between the layers likewise.
        return_dict: Whether calls return an output with names (True), or a tuple.
        gradient_checkpointing: Whether models made of it start with
            `gradient_checkpointing_enable()`.

    Raises:
        ConfigError: A value is out of range or contradicts another one, or an argument is a near
            miss of a field or would change what OPT computes.
    """

    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    id2label: dict[int, str] = dataclasses.field(default_factory=dict[int, str])
    problem_type: str | None = None
    dtype: str | None = None
    output_attentions: bool = False
    output_hidden_states: bool = False
    return_dict: bool = True
    gradient_checkpointing: bool = False

    def __init__(self, *positional: Any, **settings: Any) -> None:
        if len(positional) > len(_FIELDS):
            raise ConfigError(f"expected at most {len(_FIELDS)} values, received {len(positional)}")
        given = dict(zip(_FIELDS, positional, strict=False))
        if twice := given.keys() & settings.keys():
            raise ConfigError(f"{', '.join(sorted(twice))}: given twice")
        self._fill(given | settings)

    def _fill(self, values: Mapping[str, Any], source: str = "") -> None:
        """Takes the contents of a file, or arguments, over; what they leave open is the default."""
        keys = sort_keys(values, _FIELDS, source)
        found = keys.fields
        vars(self).update(_FIELDS)
        if found.get("id2label") is not None:
            labels = labels_by_index(found["id2label"], source)
            found = {"num_labels": len(labels)} | found | {"id2label": labels}
        else:
            count = found.get("num_labels", self.num_labels)
            found = found | {"id2label": default_labels(count) if type(count) is int else None}
        for name, value in found.items():
            vars(self)[name] = NORMAL[name](value) if name in NORMAL else value
        vars(self)["word_embed_proj_dim"] = found.get("word_embed_proj_dim") or self.hidden_size
        try:
            self.validate()
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}" if source else str(error)) from None
        self.structure = tuple(getattr(self, name) for name in STRUCTURE)
        check_synonyms(self, keys.synonyms, source)
        for name, value in keys.extras.items():
            if not hasattr(type(self), name):
                setattr(self, name, value)
        if source and keys.unknown:
            names = ", ".join(keys.unknown)
            notice(f"{source}: keys that OPT does not have, without effect: {names}")

    def __setattr__(self, name: str, value: Any) -> None:
        name = ALIASES.get(name, name)
        state = vars(self)
        state.pop("_snapshot", None)
        if name == "num_labels" and value != self.num_labels:
            state["id2label"] = default_labels(value) if type(value) is int else None
            state.pop("label2id", None)
        if name == "id2label":
            value = default_labels(self.num_labels) if value is None else labels_by_index(value, "")
            state["num_labels"] = len(value)
            state.pop("label2id", None)
        object.__setattr__(self, name, NORMAL[name](value) if name in NORMAL else value)
        if name in STRUCTURE:
            state["structure"] = tuple(state[field] for field in STRUCTURE)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OPTConfig):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in _FIELDS)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in _FIELDS if name != "id2label"))

    def snapshot(self) -> Snapshot:
        """The fields as they are now, the same object until one changes.

        Compiled programs are kept by it: a change makes another program, and what was made is found
        again when it is taken back.
        """
        kept = vars(self).get("_snapshot")
        if kept is None:
            kept = vars(self)["_snapshot"] = Snapshot(self.copy(), hash(self))
        return kept

    def become(self, snapshot: Snapshot) -> None:
        """Takes the fields of a snapshot over; what else this object was given, it keeps."""
        if snapshot.config != self:
            self.update({name: getattr(snapshot.config, name) for name in _FIELDS})

    def validate(self) -> None:
        """Checks every field, and how they go together.

        Raises:
            ConfigError: A value is out of range or contradicts another one.
        """
        check_types(self, _HINTS)
        check_ranges(self)

    @property
    def embed_dim(self) -> int:
        """Width of the token embedding P, never None."""
        return self.word_embed_proj_dim or self.hidden_size

    @property
    def head_dim(self) -> int:
        """Width of one attention head K."""
        return self.hidden_size // self.num_attention_heads

    @property
    def has_projections(self) -> bool:
        """Whether the embedding is narrower (or wider) than the model.

        Such a model has a `project_in` and a `project_out`.
        """
        return self.embed_dim != self.hidden_size

    @property
    def has_final_layer_norm(self) -> bool:
        """Whether the decoder ends in a norm: pre-LN models do, unless the config removes it."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm

    @classmethod
    def from_preset(cls, name: str) -> "OPTConfig":
        """Makes the configuration of an official checkpoint.

        Args:
            name: Exact name, such as "opt-125m" or "galactica-6.7b"; all of them are in
                `opt_core.presets.PRESETS`.

        Raises:
            ConfigError: No preset has this name; the message lists those there are.
        """
        if name not in PRESETS:
            raise ConfigError(f"no preset {name!r}; expected one of {', '.join(PRESETS)}")
        return cls(**PRESETS[name])

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any] | None = None, source: str = "config", **changes: Any
    ) -> Any:
        """Makes a configuration from the contents of a config.json.

        Args:
            values: Keys as `transformers` or an older conversion wrote them (`config_dict` is
                another name of it). A key that OPT does not have and that cannot change what it
                computes is kept, and named in a warning.
            source: Name of the file, for messages.
            **changes: Fields that replace those of the file; with `return_unused_kwargs`, those
                that are no fields are returned too.

        Raises:
            ConfigError: Another model, quantised weights, a key that changes what OPT computes, a
                near miss of a field, an alias that contradicts its field, or a bad value.
        """
        given, wants_unused = changes.pop("config_dict", values), changes.pop(_UNUSED, False)
        known = {*_FIELDS, *ALIASES}
        unused = {k: v for k, v in changes.items() if wants_unused and k not in known}
        config = cls.__new__(cls)
        config._fill(given or {}, source)
        rest = {k: v for k, v in changes.items() if k not in unused}
        config = config.replace(**rest) if rest else config
        return (config, unused) if wants_unused else config

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | PathLike[str] | None = None,
        return_unused_kwargs: bool = False,
        **arguments: Any,
    ) -> Any:
        """Reads config.json from a folder or a hub repository.

        Args:
            path_or_hub_id: Folder, path of a config.json, hub id such as "facebook/opt-125m",
                or "mini".
            return_unused_kwargs: Return the arguments that are neither fields nor the hub's too.
            **arguments: `revision`, `token`, `local_files_only`, `cache_dir`, `subfolder` and so
                on, as in `opt_core.hub.resolve`; and fields, which replace those of the file.

        Returns:
            The configuration; with `return_unused_kwargs`, it and a dict.

        Raises:
            ConfigError: The file is missing (then it is an OSError too), is not JSON, or describes
                no OPT model; or an argument is unknown.
        """
        from opt_core.hub import resolve  # huggingface_hub is imported only when it is needed

        place = arguments.pop("pretrained_model_name_or_path", path_or_hub_id)
        changes = {k: v for k, v in arguments.items() if k in ("dtype", "torch_dtype")}
        others = {k: v for k, v in arguments.items() if k not in changes}
        sort = sort_arguments if return_unused_kwargs else read_arguments
        options = sort(others, _FIELDS)
        path = resolve(place, files=("config.json",), **options.hub)
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise MissingFileError(f"{path}: no such file")
        config = cls.from_dict(read_json(path), str(path), **(changes | options.changes))
        config.name_or_path = str(place)
        return (config, options.unused) if return_unused_kwargs else config

    @classmethod
    def from_any(cls, config: Any) -> "OPTConfig":
        """A configuration of whatever a caller has.

        Args:
            config: A configuration, which is returned itself; one of `transformers`, a dict, or
                what `from_pretrained` takes.

        Raises:
            ConfigError: It is something else, or describes no OPT model.
        """
        if isinstance(config, OPTConfig):
            return config
        if isinstance(config, str | PathLike):
            return cls.from_pretrained(cast("str | PathLike[str]", config))
        values: Any = config.to_dict() if hasattr(config, "to_dict") else config
        if not isinstance(values, Mapping):
            raise ConfigError(f"config: expected an OPTConfig, received {type(config).__name__}")
        return cls.from_dict(cast("Mapping[str, Any]", values), "config")

    def to_dict(self) -> dict[str, Any]:
        """Contents of config.json: every field, and what `transformers` needs to know it as OPT.

        Attributes beside the fields are there where they are set.
        """
        values: dict[str, Any] = {"model_type": self.model_type}
        values |= {name: getattr(self, name) for name in _FIELDS}
        for name in _SWITCHES:
            if values[name] == _FIELDS[name]:
                del values[name]
        # transformers derives num_labels from id2label, and before 4.56 knew only torch_dtype.
        labels: dict[int, str] = values["id2label"] or default_labels(values["num_labels"])
        del values["num_labels"]
        values["id2label"] = {str(k): v for k, v in labels.items()}
        values["label2id"] = self.label2id
        values["torch_dtype"] = values.pop("dtype")
        values["transformers_version"] = SPELLED_AS
        if isinstance(self.eos_token_id, tuple):
            values["eos_token_id"] = list(self.eos_token_id)
        values |= {k: v for k, v in self.extras().items() if k not in values}
        return {k: v for k, v in values.items() if v is not None or k.endswith("token_id")}

    def extras(self) -> dict[str, Any]:
        """Attributes beside the fields, those that belong to this object alone left out."""
        return {name: value for name, value in vars(self).items() if name not in _NOT_SAVED}

    def replace(self, **changes: Any) -> "OPTConfig":
        """A copy with some fields changed.

        Raises:
            ConfigError: A name that is no field, or a value that does not fit.
        """
        for name in changes:
            if ALIASES.get(name, name) not in _FIELDS and not is_known(name):
                near = near_miss(name, _FIELDS)
                hint = (
                    f"did you mean {near!r}?" if near else f"expected one of {', '.join(_FIELDS)}"
                )
                raise ConfigError(f"unknown field {name!r}; {hint}")
        keys = sort_keys(changes, _FIELDS)
        found = keys.fields
        # A width that merely followed hidden_size keeps following it.
        if "hidden_size" in found and not self.has_projections:
            found.setdefault("word_embed_proj_dim", found["hidden_size"])
        new = copy.deepcopy(self)
        for name, value in (found | keys.extras).items():
            setattr(new, name, value)
        if new.word_embed_proj_dim is None:
            new.word_embed_proj_dim = new.hidden_size
        if found.get("id2label") is not None:  # whichever was set last, they must agree
            vars(new)["num_labels"] = found.get("num_labels", new.num_labels)
        new.validate()
        check_synonyms(new, keys.synonyms)
        return new


_FIELDS: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(OPTConfig)}
_FIELDS["id2label"] = None  # follows num_labels
_HINTS = {name: hint for name, hint in get_type_hints(OPTConfig).items() if name in _FIELDS}
_NOT_SAVED = {
    *(*_FIELDS, "structure", "label2id", "_snapshot"),
    *("_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "_commit_hash"),
}
_UNUSED = "return_unused_kwargs"
_SWITCHES = ("output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing")
