"""The configuration: published sizes, files of every age, and what must not be accepted."""

import json
import pickle

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError, ConfigError
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
        ({"eos_token_id": [2, 50]}, "eos_token_id", (2, 50)),
    ],
    ids=str,
)
def test_older_and_foreign_keys(found, field, value):
    assert getattr(OPTConfig.from_dict(found), field) == value


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"hiden_size": 64}, "unknown key 'hiden_size' .* did you mean 'hidden_size'"),
        ({"eos_token_ids": [2]}, "did you mean 'eos_token_id'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06 is not supported; expected 1e-05"),
        ({"rope_theta": 1e4}, "rope_theta=10000.0 is not supported; expected none"),
        ({"intermediate_size": 64}, "intermediate_size=64 contradicts ffn_dim=3072"),
        ({"num_key_value_heads": 4}, "num_key_value_heads=4 contradicts num_attention_heads=12"),
        ({"model_type": "gpt2"}, "model_type='gpt2' is not supported; expected 'opt'"),
        ({"scale_embedding": True}, "scale_embedding=True"),
        ({"learned_embeddings": False}, "learned_embeddings=False"),
        (
            {"quantization_config": {"bits": 4, "quant_method": "hqq"}},
            "quantised by 'hqq' are not read; expected gptq, awq, bitsandbytes or compressed-",
        ),
        (
            {"quantization_config": {"bits": 8, "quant_method": "awq"}},
            'take the original checkpoint and pass quantize="int8"',
        ),
        (
            {"vocab_size": "x", "n_embd": 3, "model_type": "gpt_neox"},
            "model_type='gpt_neox' is not",
        ),
        ({"model_type": "blip-2", "text_config": {"model_type": "opt"}}, "--prefix language_model"),
        ({"eos_token_id": "2"}, "eos_token_id: expected int, received '2'"),
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


def test_harmless_keys_are_kept_and_named_once(tmp_path):
    """DeepSpeed-Chat, chat front ends and newer libraries add keys; `transformers` loads them."""
    found = {"end_token_id": 2, "use_mems": False, "gradient_checkpointing": False}
    found |= {"num_key_value_heads": 12, "intermediate_size": 3072, "head_dim": 64, "sep": None}
    found |= {"eos_token_id": [2, 50], "layer_norm_eps": 1e-5, "max_length": 30}
    (tmp_path / "config.json").write_text(json.dumps(found))
    with pytest.warns(UserWarning, match="without effect: end_token_id, use_mems$") as caught:
        config = OPTConfig.from_pretrained(tmp_path)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert config.end_token_id == 2
    assert config.eos_token_id == (2, 50)
    assert config.max_length == 30
    config.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["end_token_id"] == 2
    assert saved["eos_token_id"] == [2, 50]


def test_fields_are_set_and_validated_when_used():
    config = OPTConfig()
    before, kept = hash(config), config.snapshot()
    config.use_cache = False
    config.pad_token_id = 2
    config.hidden_size = 7
    config.torch_dtype = "torch.float16"
    assert (config.use_cache, config.pad_token_id, config.hidden_size) == (False, 2, 7)
    assert config.dtype == config.torch_dtype == "float16"
    assert config != OPTConfig()
    assert hash(config) != before
    assert config.snapshot() != kept
    with pytest.raises(ConfigError, match="hidden_size=7 does not divide into"):
        config.validate()
    with pytest.raises(ConfigError, match="hidden_size=7 does not divide into"):
        config.save_pretrained("nowhere")
    config.hidden_size, config.use_cache, config.pad_token_id, config.dtype = 768, True, 1, None
    assert config == OPTConfig()
    assert hash(config) == before
    assert config.snapshot() == kept
    assert config.snapshot() is config.snapshot()


def test_labels_follow_one_another():
    config = OPTConfig(num_labels=5)
    assert (len(config.id2label), len(config.label2id)) == (5, 5)
    config.num_labels = 3
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config.id2label = {0: "no", 1: "yes"}
    assert config.num_labels == 2
    assert config.label2id == {"no": 0, "yes": 1}
    with pytest.raises(ConfigError, match="id2label: expected keys"):
        OPTConfig(num_labels=3, id2label={0: "no", 1: "yes"})


def test_what_transformers_configurations_have():
    config = OPTConfig(
        hidden_size=16, embed_dim=16, num_attention_heads=2, return_dict=False,
        output_attentions=True, finetuning_task="x", name_or_path="here", my_own=3,
        attn_implementation="eager",
    )  # fmt: skip
    assert (config.word_embed_proj_dim, config.my_own, config.finetuning_task) == (16, 3, "x")
    assert (config.use_return_dict, config.output_attentions) == (False, True)
    assert (config._name_or_path, config._attn_implementation) == ("here", "eager")
    assert (config.model_type, config.is_encoder_decoder, config.max_length) == ("opt", False, 20)
    assert config.get_text_config() is config
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = config.nothing
    for wrong, message in (
        ({"hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"num_heads": 3}, "num_heads=3 contradicts num_attention_heads=12"),
        ({"embed_dim": 3, "word_embed_proj_dim": 4}, "embed_dim=3 contradicts"),
    ):
        with pytest.raises(ConfigError, match=message):
            OPTConfig(**wrong)
    asks = OPTConfig(is_encoder_decoder=True, pruned_heads={0: [1]})  # models of it are refused
    assert asks.is_encoder_decoder
    with pytest.raises(
        ConfigError, match=r"config\.json: is_encoder_decoder=True is not supported"
    ):
        OPTConfig.from_dict({"is_encoder_decoder": True}, "config.json")


def test_a_dtype_equals_the_frameworks_own():
    config = OPTConfig(torch_dtype=np.float16)
    assert config.dtype == config.torch_dtype == "float16" == np.dtype("float16")
    assert config.dtype == np.float16
    assert config.dtype != np.float32
    assert json.loads(config.to_json_string())["torch_dtype"] == "float16"
    assert pickle.loads(pickle.dumps(config)).dtype == "float16"
    assert hash(config) == hash(OPTConfig(dtype="float16"))


def test_methods_of_transformers_that_read(tmp_path):
    config = OPTConfig(hidden_size=24, num_attention_heads=4)
    config.update_from_string("use_cache=false,dropout=0.5,num_hidden_layers=3")
    assert (config.use_cache, config.dropout, config.num_hidden_layers) == (False, 0.5, 3)
    for text, message in (
        ("width=3", "'width' is no field"),
        ("use_cache=perhaps", "use_cache: expected a bool, received 'perhaps'"),
        ("ffn_dim=wide", "ffn_dim: expected a int, received 'wide'"),
    ):
        with pytest.raises(ConfigError, match=message):
            config.update_from_string(text)
    config.save_pretrained(tmp_path)
    values, unused = OPTConfig.get_config_dict(tmp_path, mine=1)
    assert (values["ffn_dim"], unused) == (3072, {"mine": 1})
    assert OPTConfig.from_pretrained(pretrained_model_name_or_path=tmp_path) == config
    read, unused = OPTConfig.from_dict(
        config_dict=values, return_unused_kwargs=True, dropout=0.2, mine=2
    )
    assert (read.dropout, unused) == (0.2, {"mine": 2})
    assert len(config.per_layer_config) == 3


def test_json_of_transformers_methods(tmp_path):
    config = OPTConfig(hidden_size=24, num_attention_heads=4, word_embed_proj_dim=24)
    assert config.to_diff_dict() == {
        "model_type": "opt", "hidden_size": 24, "num_attention_heads": 4, "word_embed_proj_dim": 24,
        "transformers_version": "4.57.6",
    }  # fmt: skip
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    config.to_json_file(tmp_path / "mine.json")
    assert OPTConfig.from_json_file(tmp_path / "mine.json") == config
    config.update({"dropout": 0.3, "num_labels": 4})
    assert (config.dropout, config.num_labels) == (0.3, 4)
    assert len(repr(config)) < 450
    name, _, text = str(config).partition(" ")
    assert name == "OPTConfig"
    assert json.loads(text)["hidden_size"] == 24


def test_arguments_of_from_pretrained(tmp_path):
    OPTConfig().save_pretrained(save_directory=tmp_path / "sub")
    read = OPTConfig.from_pretrained(
        tmp_path, subfolder="sub", output_attentions=True, num_labels=3, torch_dtype="float16",
        trust_remote_code=True, use_auth_token=None,
    )  # fmt: skip
    assert (read.output_attentions, read.num_labels, read.dtype) == (True, 3, "float16")
    assert read.name_or_path == str(tmp_path)
    config, unused = OPTConfig.from_pretrained(
        tmp_path / "sub", return_unused_kwargs=True, foo=1, use_cache=False
    )
    assert (config.use_cache, unused) == (False, {"foo": 1})
    with pytest.raises(ArgumentError, match="unknown argument 'num_label'; did you mean 'num_labe"):
        OPTConfig.from_pretrained(tmp_path / "sub", num_label=3)
    for missing in ("./nowhere/at/all", str(tmp_path)):
        with pytest.raises(OSError, match="no such f") as error:
            OPTConfig.from_pretrained(missing)
        assert isinstance(error.value, ConfigError)


def test_configurations_of_others():
    class Theirs:
        def to_dict(self):
            return OPTConfig(num_labels=7).to_dict()

    assert OPTConfig.from_any(Theirs()).num_labels == 7
    with pytest.raises(ConfigError, match="expected an OPTConfig, received int"):
        OPTConfig.from_any(3)


def test_replace():
    config = OPTConfig()
    assert config.replace(dropout=0.0).dropout == 0.0
    assert config.replace(hidden_size=96).word_embed_proj_dim == 96
    assert OPTConfig(word_embed_proj_dim=512).replace(hidden_size=96).word_embed_proj_dim == 512
    labelled = config.replace(id2label={0: "a", 1: "b"})
    assert labelled.replace(num_labels=1).id2label == {0: "LABEL_0"}
    assert config == OPTConfig()
    with pytest.raises(ConfigError, match="unknown field 'hiden_size'"):
        config.replace(hiden_size=3)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    OPTConfig().save_pretrained(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(TypeError):
        write_json(tmp_path / "config.json", {"x": object()})
    assert (tmp_path / "config.json").read_bytes() == before
