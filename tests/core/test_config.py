"""The configuration: published sizes, files of every age, and what must not be accepted."""

import dataclasses
import json

import pytest

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.json_files import write_json
from opt_core.presets import PRESETS

HUB_125M = {
    "_name_or_path": "opt-125m", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
    "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0,
    "bos_token_id": 2, "do_layer_norm_before": True, "dropout": 0.1, "eos_token_id": 2,
    "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0,
    "max_position_embeddings": 2048, "model_type": "opt", "num_attention_heads": 12,
    "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>", "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0", "use_cache": True, "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}  # fmt: skip
"""The hub's config.json of facebook/opt-125m."""


def test_the_hubs_file_is_the_preset():
    assert OPTConfig.from_dict(HUB_125M).replace(dtype=None) == OPTConfig.from_preset("opt-125m")


def test_defaults_are_opt_125m():
    assert OPTConfig() == OPTConfig.from_preset("opt-125m")


def test_official_shapes():
    """Head sizes, and the odd one out: only opt-350m is post-LN, projected, without a last norm."""
    heads = {name: OPTConfig.from_preset(name).head_dim for name in PRESETS}
    assert heads["opt-2.7b"] == 80
    assert heads["opt-1.3b"] == 64
    assert heads["opt-175b"] == 128
    odd = [n for n in PRESETS if OPTConfig.from_preset(n).has_projections]
    assert (
        odd
        == [n for n in PRESETS if not OPTConfig.from_preset(n).has_final_layer_norm]
        == ["opt-350m"]
    )


def test_a_preset_name_must_match_exactly():
    with pytest.raises(ConfigError, match="no preset 'opt-125'; expected one of opt-125m"):
        OPTConfig.from_preset("opt-125")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"word_embed_proj_dim": 512, "do_layer_norm_before": False},
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "_remove_final_layer_norm": True,
        },
        {"num_labels": 5},
        {
            "num_labels": 2,
            "id2label": {0: "no", 1: "yes"},
            "problem_type": "single_label_classification",
        },
        {
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
            "pad_token_id": None,
            "bos_token_id": None,
        },
    ],
    ids=str,
)
def test_round_trip_through_a_file(tmp_path, changes):
    config = OPTConfig(**changes)
    config.save_pretrained(tmp_path)
    assert OPTConfig.from_pretrained(tmp_path) == config
    assert hash(OPTConfig.from_pretrained(tmp_path)) == hash(config)


@pytest.mark.parametrize(
    ("found", "field", "value"),
    [
        ({"d_model": 1536}, "hidden_size", 1536),
        ({"d_model": 1536, "hidden_size": 1536}, "hidden_size", 1536),
        ({"num_layers": 3}, "num_hidden_layers", 3),
        ({"embed_dim": 512}, "word_embed_proj_dim", 512),
        ({"hidden_size": 512, "num_attention_heads": 8}, "word_embed_proj_dim", 512),
        ({"torch_dtype": "torch.float16"}, "dtype", "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "dtype", "float32"),
        ({"share_input_output_embed": True}, "tie_word_embeddings", True),
        ({"bias": False, "enable_bias": False}, "enable_bias", False),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "num_labels", 3),
        (
            {"scale_embedding": False, "learned_embeddings": True, "quantization_config": None},
            "dropout",
            0.1,
        ),
        (
            {"output_projection": True, "decoder_layernorm": True, "activation_dropout": 0.0},
            "dropout",
            0.1,
        ),
        ({"something_new": None}, "dropout", 0.1),
    ],
    ids=str,
)
def test_older_and_foreign_keys(found, field, value):
    assert getattr(OPTConfig.from_dict(found), field) == value


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"something_new": 1}, "unknown key 'something_new'"),
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; expected 'opt'"),
        ({"scale_embedding": True}, "scale_embedding=True"),
        ({"learned_embeddings": False}, "learned_embeddings=False"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"d_model": 512, "hidden_size": 768}, "d_model=512 contradicts hidden_size=768"),
        ({"bias": False, "enable_bias": True}, "bias=False contradicts enable_bias=True"),
        ({"hidden_size": 770}, "hidden_size=770 does not divide into num_attention_heads=12"),
        ({"hidden_size": "768"}, "hidden_size: expected int, received '768'"),
        ({"hidden_size": 768.0}, "hidden_size: expected int"),
        ({"hidden_size": True}, "hidden_size: expected int, received True"),
        ({"hidden_size": None}, "hidden_size: expected int, received None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers: expected at least 1"),
        ({"vocab_size": -3}, "vocab_size: expected at least 1"),
        ({"dropout": 1.0}, "dropout: expected 0 <= p < 1"),
        ({"dropout": float("nan")}, "dropout"),
        ({"init_std": float("inf")}, "init_std"),
        ({"activation_function": "tanhexp"}, "activation_function: expected one of relu"),
        ({"problem_type": "ranking"}, "problem_type"),
        ({"torch_dtype": "int8"}, "dtype: expected one of float32"),
        ({"pad_token_id": 50272}, "pad_token_id=50272 is outside the vocabulary"),
        ({"do_layer_norm_before": "yes"}, "do_layer_norm_before: expected bool"),
        ({"id2label": {"x": "a"}}, "id2label keys must be integers"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: expected keys 0..1"),
        ({"num_labels": 3, "id2label": {"0": "a"}}, "id2label: expected keys 0..2"),
    ],
    ids=str,
)
def test_malformed_files_name_the_field(tmp_path, found, message):
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.raises(ConfigError, match=message) as error:
        OPTConfig.from_pretrained(tmp_path)
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'"opt"', b"[" * 100_000])
def test_files_that_are_no_json_object(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.json"):
        OPTConfig.from_pretrained(tmp_path)


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        OPTConfig().hidden_size = 3  # type: ignore[misc]


def test_replace():
    config = OPTConfig()
    assert config.replace(dropout=0.0).dropout == 0.0
    assert config.replace(hidden_size=96).word_embed_proj_dim == 96
    assert OPTConfig(word_embed_proj_dim=512).replace(hidden_size=96).word_embed_proj_dim == 512
    labelled = config.replace(id2label={0: "a", 1: "b"})
    assert labelled.replace(num_labels=3).id2label is None
    with pytest.raises(ConfigError, match="unknown field 'hiden_size'"):
        config.replace(hiden_size=3)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    OPTConfig().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", {"x": object()})
    assert (tmp_path / "config.json").read_bytes() == before
