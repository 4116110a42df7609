"""The model's configuration: `transformers`' field names and defaults, frozen and validated.

Reading is fail-closed: a key this project does not know raises instead of being dropped, because a
dropped key is how two implementations come to give different numbers for one checkpoint.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from opt_core.errors import ConfigError
from opt_core.json_files import read_json, write_json
from opt_core.presets import PRESETS

ACTIVATIONS = ("relu", "gelu", "gelu_new", "gelu_pytorch_tanh", "silu", "swish")
DTYPES = ("float32", "float16", "bfloat16", "float64")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")

# Keys that older conversions wrote for the same thing (the hub's config.json files of May 2022).
_ALIASES = {
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "word_embed_proj_dim",
    "bias": "enable_bias",
    "share_input_output_embed": "tie_word_embeddings",
    "torch_dtype": "dtype",
}
# Keys that ask for another architecture unless they have this value.
_FIXED: dict[str, object] = {
    "model_type": "opt",
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "scale_embedding": False,
    "scale_embeddings": False,
    "learned_embeddings": True,
    "pruned_heads": {},
    "quantization_config": {},
}
# Keys with no bearing on what the model computes: bookkeeping, and the generation defaults that old
# configs carried (generation reads generation_config.json).
_IGNORED = frozenset([
    "_name_or_path", "activation_dropout", "architectures", "attn_implementation",
    "_attn_implementation", "_attn_implementation_autoset", "auto_map", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_layernorm", "decoder_start_token_id", "finetuning_task",
    "is_decoder", "label2id", "num_classes", "output_attentions", "output_hidden_states",
    "output_projection", "prefix", "return_dict", "sep_token_id", "task_specific_params",
    "tf_legacy_loss", "tokenizer_class", "torchscript", "transformers_version", "use_bfloat16",
    "use_return_dict", "tie_encoder_decoder", "bad_words_ids", "begin_suppress_tokens",
    "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "max_length", "max_new_tokens", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores",
    "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "suppress_tokens",
    "temperature", "top_k", "top_p", "typical_p",
])  # fmt: skip


@dataclass(frozen=True)
class OPTConfig:
    """Hyper-parameters of one OPT model.

    Field names, meanings and defaults are those of `transformers.OPTConfig`; the defaults describe
    opt-125m. Instances are immutable and hashable: change one with `replace`.

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
        activation_function: One of `ACTIVATIONS`; "gelu" is the exact (erf) one.
        layerdrop: Probability of leaving out a whole layer, in training.
        init_std: Standard deviation of freshly initialised weights.
        use_cache: Kept for other readers of the file; here passing a cache is what uses one.
        pad_token_id: Padding id; its embedding row starts at zero and gets no gradient.
        bos_token_id: First token of every text (the same id as the last one, for OPT).
        eos_token_id: Token that ends a text.
        enable_bias: Whether the linear layers have biases (False: Galactica 30b, 120b).
        layer_norm_elementwise_affine: Whether norms have gamma and beta (False: Galactica 30b,
            120b).
        tie_word_embeddings: Whether the language-model head is the token embedding.
        num_labels: Classes of the sequence-classification head.
        id2label: Class names, by index; None means LABEL_0, LABEL_1, ...
        problem_type: One of `PROBLEM_TYPES`, or None: inferred from `num_labels` and the labels.
        dtype: Data type the weights are stored in, where the file says so.

    Raises:
        ConfigError: A value is out of range or contradicts another one.
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
    eos_token_id: int | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True
    num_labels: int = 2
    id2label: dict[int, str] | None = field(default=None, hash=False)
    problem_type: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        if self.word_embed_proj_dim is None:
            object.__setattr__(self, "word_embed_proj_dim", self.hidden_size)
        _check_ranges(self)

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
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> "OPTConfig":
        """Makes a configuration from the contents of a config.json.

        Args:
            values: Keys as `transformers` or an older conversion wrote them.
            source: Name of the file, for messages.

        Raises:
            ConfigError: An unknown key, an alias that contradicts its field, or a bad value.
        """
        fields = {f.name for f in dataclasses.fields(cls)}
        found: dict[str, Any] = {k: v for k, v in values.items() if k in fields}
        for key, value in values.items():
            if key in fields or key in _IGNORED:
                continue
            if key in _ALIASES:
                name = _ALIASES[key]
                if found.setdefault(name, value) != value and key != "torch_dtype":
                    raise ConfigError(
                        f"{source}: {key}={value!r} contradicts {name}={found[name]!r}; "
                        "keep one of them"
                    )
            elif key in _FIXED:
                if value is not None and value != _FIXED[key]:
                    raise ConfigError(
                        f"{source}: {key}={value!r} is not supported; expected {_FIXED[key]!r}"
                    )
            elif value is not None:
                raise ConfigError(
                    f"{source}: unknown key {key!r} (value {value!r}); if it does not change what "
                    "the model computes, remove it from the file"
                )
        return cls._from_file_values(found, source)

    @classmethod
    def _from_file_values(cls, found: dict[str, Any], source: str) -> "OPTConfig":
        labels: Mapping[Any, Any] | Sequence[Any] | float | None = found.get("id2label")
        if isinstance(labels, Mapping):
            try:
                found["id2label"] = {int(k): str(v) for k, v in labels.items()}
            except ValueError:
                raise ConfigError(f"{source}: id2label keys must be integers: {labels!r}") from None
            found.setdefault("num_labels", len(found["id2label"]))
            if found["id2label"] == _default_labels(found["num_labels"]):
                found["id2label"] = None
        if isinstance(found.get("dtype"), str):
            found["dtype"] = found["dtype"].removeprefix("torch.")
        try:
            return cls(**found)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | PathLike[str], **hub: Any) -> "OPTConfig":
        """Reads config.json from a folder or a hub repository.

        Args:
            path_or_hub_id: Folder, path of a config.json, hub id such as "facebook/opt-125m",
                or "mini".
            **hub: `revision`, `token`, `local_files_only`, as in `opt_core.hub.resolve`.

        Raises:
            ConfigError: The file is missing, is not JSON, or describes no OPT model.
        """
        from opt_core.hub import resolve  # huggingface_hub is imported only when it is needed

        path = resolve(path_or_hub_id, files=("config.json",), **hub)
        path = path / "config.json" if path.is_dir() else path
        return cls.from_dict(read_json(path), str(path))

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes config.json into a folder (made if missing), readable by `transformers`."""
        write_json(Path(folder) / "config.json", self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Contents of config.json: every field, and what `transformers` needs to know it as OPT."""
        values: dict[str, Any] = {"model_type": "opt"}
        values |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        # transformers derives num_labels from id2label, and before 4.56 knew only torch_dtype.
        labels = self.id2label or _default_labels(values.pop("num_labels"))
        values["id2label"] = {str(k): v for k, v in labels.items()}
        values["label2id"] = {v: k for k, v in labels.items()}
        values["torch_dtype"] = values.pop("dtype")
        return {k: v for k, v in values.items() if v is not None or k.endswith("token_id")}

    def replace(self, **changes: Any) -> "OPTConfig":
        """A copy with some fields changed.

        Raises:
            ConfigError: A name that is no field, or a value that does not fit.
        """
        known = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown field {name!r}; expected one of {', '.join(known)}")
        # A width that merely followed hidden_size keeps following it.
        if "hidden_size" in changes and not self.has_projections:
            changes.setdefault("word_embed_proj_dim", None)
        if "num_labels" in changes and changes["num_labels"] != self.num_labels:
            changes.setdefault("id2label", None)
        return dataclasses.replace(self, **changes)


def _default_labels(count: int) -> dict[int, str]:
    return {i: f"LABEL_{i}" for i in range(count)}


def _check_types(config: OPTConfig) -> None:
    for name, hint in get_type_hints(OPTConfig).items():
        value = getattr(config, name)
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        kinds: list[type[Any]] = [get_origin(option) or option for option in options]
        if float in kinds:
            kinds.append(int)
        if not isinstance(value, tuple(kinds)) or (isinstance(value, bool) and bool not in kinds):
            raise ConfigError(f"{name}: expected {kinds[0].__name__}, received {value!r}")


def _check_ranges(config: OPTConfig) -> None:
    for name in (
        "vocab_size", "hidden_size", "ffn_dim", "max_position_embeddings", "embed_dim",
        "num_attention_heads", "num_hidden_layers", "num_labels",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            raise ConfigError(f"{name}: expected at least 1, received {getattr(config, name)}")
    for name in ("dropout", "attention_dropout", "layerdrop"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"{name}: expected 0 <= p < 1, received {getattr(config, name)}")
    if config.hidden_size % config.num_attention_heads:
        raise ConfigError(
            f"hidden_size={config.hidden_size} does not divide into "
            f"num_attention_heads={config.num_attention_heads}"
        )
    if not 0 <= config.init_std < float("inf"):
        raise ConfigError(f"init_std: expected a finite number >= 0, received {config.init_std}")
    for name, allowed in (
        ("activation_function", ACTIVATIONS), ("problem_type", PROBLEM_TYPES), ("dtype", DTYPES),
    ):  # fmt: skip
        value = getattr(config, name)
        if value is not None and value not in allowed:
            raise ConfigError(f"{name}: expected one of {', '.join(allowed)}, received {value!r}")
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        raise ConfigError(
            f"pad_token_id={config.pad_token_id} is outside the vocabulary "
            f"(vocab_size={config.vocab_size})"
        )
    if config.id2label is not None and set(config.id2label) != set(range(config.num_labels)):
        raise ConfigError(
            f"id2label: expected keys 0..{config.num_labels - 1} (num_labels), "
            f"received {sorted(config.id2label)}"
        )
