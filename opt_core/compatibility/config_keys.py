"""Keys of a config.json, or arguments of a configuration, and what becomes of each.

A key is a field, another name of one, one of `transformers`' own that changes nothing, or unknown.
Unknown ones are kept: trainers, chat front ends and newer libraries add them. Refused are those
that change what OPT computes, and near misses of a field: dropping these is how two programs come
to give different numbers for one checkpoint.
"""

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

from opt_core.checkpoints.quantized.settings import read_settings
from opt_core.errors import ConfigError

SPELLED_AS = "4.57.6"
"""Version of `transformers` whose names the files have: newer ones read them too."""

ALIASES = {
    # Older conversions wrote these (the hub's config.json files of May 2022).
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "embed_dim": "word_embed_proj_dim",
    "bias": "enable_bias",
    "share_input_output_embed": "tie_word_embeddings",
    # transformers' own second names.
    "torch_dtype": "dtype",
    "attn_implementation": "_attn_implementation",
    "name_or_path": "_name_or_path",
}
"""Other name -> field or attribute."""

SYNONYMS = {
    "intermediate_size": "ffn_dim",
    "decoder_ffn_dim": "ffn_dim",
    "decoder_ffn_embed_dim": "ffn_dim",
    "ffn_embed_dim": "ffn_dim",
    "n_inner": "ffn_dim",
    "n_embd": "hidden_size",
    "decoder_embed_dim": "hidden_size",
    "n_head": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "num_heads": "num_attention_heads",
    "decoder_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "n_layer": "num_hidden_layers",
    "n_layers": "num_hidden_layers",
    "decoder_layers": "num_hidden_layers",
    "n_positions": "max_position_embeddings",
    "max_seq_len": "max_position_embeddings",
    "max_target_positions": "max_position_embeddings",
    "hidden_act": "activation_function",
    "activation_fn": "activation_function",
    "decoder_normalize_before": "do_layer_norm_before",
    "attention_bias": "enable_bias",
    "mlp_bias": "enable_bias",
    "use_bias": "enable_bias",
}
"""Other models' name of a field: harmless while it says the same as the field."""

FIXED: Mapping[str, tuple[object, ...]] = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "scale_embedding": (False,),
    "scale_embeddings": (False,),
    "learned_embeddings": (True,),
    "pruned_heads": ({},),
    "layer_norm_eps": (1e-5,),
    "layer_norm_epsilon": (1e-5,),
    "position_embedding_type": ("absolute", "learned"),
    "rope_scaling": ({},),
    "rope_theta": (),
    "rope_parameters": ({},),
    "rotary_dim": (0,),
    "alibi": (False,),
    "sliding_window": (),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
    "multi_query": (False,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
}
"""Keys that ask for another computation unless they have one of these values, or none."""

COMMON: Mapping[str, Any] = {
    "_name_or_path": "", "_attn_implementation": "sdpa", "architectures": None,
    "pruned_heads": {}, "torchscript": False, "is_decoder": False, "is_encoder_decoder": False,
    "add_cross_attention": False, "cross_attention_hidden_size": None, "tie_encoder_decoder": False,
    "finetuning_task": None, "task_specific_params": None, "tokenizer_class": None,
    "transformers_version": None, "prefix": None, "chunk_size_feed_forward": 0,
    "use_bfloat16": False, "tf_legacy_loss": False, "decoder_start_token_id": None,
    "sep_token_id": None,
    # Defaults of generation, which configurations carried before there was a file for them.
    "max_length": 20, "min_length": 0, "do_sample": False, "early_stopping": False,
    "num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0.0, "temperature": 1.0,
    "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "repetition_penalty": 1.0, "length_penalty": 1.0,
    "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0, "bad_words_ids": None,
    "num_return_sequences": 1, "output_scores": False, "return_dict_in_generate": False,
    "forced_bos_token_id": None, "forced_eos_token_id": None, "remove_invalid_values": False,
    "exponential_decay_length_penalty": None, "suppress_tokens": None,
    "begin_suppress_tokens": None,
}  # fmt: skip
"""Attributes that every configuration of `transformers` has, where nobody says otherwise."""

_KNOWN = frozenset([
    *COMMON, "model_type", "quantization_config", "activation_dropout", "auto_map", "chat_template",
    "_attn_implementation_autoset", "_attn_implementation_internal", "_commit_hash", "num_classes",
    "decoder_layernorm", "output_projection", "use_return_dict", "max_new_tokens", "label2id",
    "gradient_checkpointing", "initializer_range",
])  # fmt: skip
_NEAR = 0.88
"""How alike a key and a field must be to be taken for a slip: above "end_token_id", which
DeepSpeed-Chat writes."""


@dataclass(frozen=True)
class SortedKeys:
    """Keys by what becomes of them.

    Attributes:
        fields: Values of fields.
        extras: What is kept as an attribute.
        synonyms: Other models' names of fields, to be compared with these.
        unknown: Names among `extras` that nobody knows.
    """

    fields: dict[str, Any]
    extras: dict[str, Any]
    synonyms: dict[str, Any]
    unknown: tuple[str, ...]


def sort_keys(values: Mapping[str, Any], fields: Collection[str], source: str = "") -> SortedKeys:
    """Sorts the keys of a file, or the arguments of a configuration.

    Args:
        values: Keys and values.
        fields: Names of the configuration's fields.
        source: Name of the file, for messages; empty: arguments.

    Raises:
        ConfigError: Another model, weights quantised in a way that is not read, a key that changes
            what OPT computes, an alias that contradicts its field, or a near miss of a field.
    """
    where = f"{source}: " if source else ""
    _check_kind(values, where)
    found = {name: value for name, value in values.items() if name in fields}
    extras: dict[str, Any] = {}
    synonyms: dict[str, Any] = {}
    unknown: list[str] = []
    for key, value in values.items():
        name = ALIASES.get(key, key)
        if name in fields:
            if found.setdefault(name, value) != value and key != "torch_dtype":
                raise ConfigError(
                    f"{where}{key}={value!r} contradicts {name}={found[name]!r}; keep one of them"
                )
        elif key in SYNONYMS:
            if value is not None:
                synonyms[key] = value
        elif source and key in FIXED:
            _check_fixed(key, value, where)
            extras[name] = value
        elif name in _KNOWN or key in FIXED or value is None:
            extras[name] = value
        elif near := near_miss(key, fields):
            raise ConfigError(
                f"{where}unknown key {key!r} (value {value!r}); did you mean {near!r}? "
                "Correct it, or remove it"
            )
        else:
            extras[key] = value
            unknown.append(key)
    # What a configuration says of the weights in its folder is theirs alone: those that are loaded,
    # and saved again, are others.
    gone = ("model_type", "quantization_config")
    extras = {k: v for k, v in extras.items() if v is not None and k not in gone}
    return SortedKeys(found, extras, synonyms, tuple(unknown))


def check_synonyms(config: Any, synonyms: Mapping[str, Any], source: str = "") -> None:
    """Compares other models' names of fields with the fields.

    Raises:
        ConfigError: One says something else.
    """
    for key, value in synonyms.items():
        field = SYNONYMS[key]
        if getattr(config, field) != value:
            where = f"{source}: " if source else ""
            raise ConfigError(
                f"{where}{key}={value!r} contradicts {field}={getattr(config, field)!r}, which is "
                "its name in OPT; keep one of them"
            )


def check_fixed(config: Any) -> None:
    """Refuses a configuration that was given, or set to, what asks for another computation.

    Raises:
        ConfigError: The first key of the kind.
    """
    held = cast("dict[str, Any]", vars(config))
    for key in FIXED.keys() & held.keys():
        _check_fixed(key, held[key], "")


def _check_fixed(key: str, value: Any, where: str) -> None:
    if value is not None and value not in FIXED[key]:
        expected = " or ".join(map(repr, FIXED[key])) or "none"
        raise ConfigError(f"{where}{key}={value!r} is not supported; expected {expected}")


def is_known(key: str) -> bool:
    """Whether a key that is no field is one that `transformers` or another model has."""
    return key in _KNOWN or key in SYNONYMS or key in FIXED or key in ALIASES


def near_miss(key: str, names: Collection[str]) -> str | None:
    """The name that a key was probably meant to be, or None."""
    plain = {name.replace("_", "").lower(): name for name in names}
    near = difflib.get_close_matches(key.replace("_", "").lower(), plain, 1, _NEAR)
    return plain[near[0]] if near else None


def _check_kind(values: Mapping[str, Any], where: str) -> None:
    kind, hint = values.get("model_type"), "this is no OPT model"
    if kind not in (None, "opt"):
        if _entries(values.get("text_config")).get("model_type") == "opt":
            hint = "opt-lm convert --prefix language_model. takes its language model, an OPT, out"
        raise ConfigError(f"{where}model_type={kind!r} is not supported; expected 'opt'; {hint}")
    read_settings(values.get("quantization_config"), where)


def _entries(value: Any) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
