"""`from_pretrained` and `save_pretrained` with transformers' arguments, in every backend."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError, ConfigError, OPTError
from tests.support.configs import CONFIGS

RECORDED = Path(__file__).parents[1] / "conversion" / "recorded"
IDS = np.array([[2, 5, 9, 77, 40, 33]], np.int32)
POST = CONFIGS["post_ln"]


@pytest.fixture
def path(folder, tmp_path):
    return shutil.copytree(folder(CONFIGS["pre_ln"]), tmp_path / "model")


def test_arguments_that_are_honoured_or_harmless(backend, path):
    plain = backend.run(backend.load(path), input_ids=IDS).logits
    model, info = backend.load(
        None, pretrained_model_name_or_path=path.parent, subfolder="model", torch_dtype="auto",
        device_map="auto", low_cpu_mem_usage=True, cache_dir="x", local_files_only=True, token=None,
        use_auth_token=None, revision=None, trust_remote_code=True, use_safetensors=True,
        from_pt=True, force_download=False, resume_download=True, proxies=None, weights_only=True,
        attn_implementation="eager", quantization_config=None, load_in_8bit=False, variant=None,
        max_memory={0: "1GB"}, offload_folder="x", output_loading_info=True, use_cache=False,
        output_attentions=True, num_labels=3, pad_token_id=9,
        generation_config={"max_new_tokens": 3},
    )  # fmt: skip
    assert info == {
        "missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": [],
    }  # fmt: skip
    config = model.config
    assert (config.use_cache, config.output_attentions, config.pad_token_id) == (False, True, 9)
    assert (config.num_labels, config._attn_implementation) == (3, "eager")
    assert model.generation_config.max_new_tokens == 3
    np.testing.assert_allclose(backend.run(model, input_ids=IDS).logits, plain, atol=1e-5)


def test_arguments_that_are_refused_by_name(backend, path):
    for arguments, message in (
        ({"load_in_8bit": True}, 'pass quantize="int8"'),
        ({"quantization_config": {"load_in_4bit": True}}, 'pass quantize="int4"'),
        ({"device_map": {"model": 0, "lm_head": "cpu"}}, "expected one device for the whole model"),
        ({"gguf_file": "x"}, "GGUF files are not read"),
        ({"torch_dtype": "int8"}, "dtype: expected one of float32"),
        ({"hidden_sizes": 3}, "did you mean 'hidden_size'"),
        ({"tokens": 3}, "unknown argument 'tokens'; did you mean 'token'"),
        ({"num_attention_heads": 5}, "does not divide into num_attention_heads=5"),
        ({"variant": "fp16"}, "variant: expected one of model.safetensors.index.fp16.json"),
        ({"generation_config": 3}, "expected a GenerationConfig, received int"),
    ):
        with pytest.raises(OPTError, match=message) as error:
            backend.load(path, **arguments)
        assert "\n" not in str(error.value)
    with pytest.raises(OSError, match=r"no such folder or file"):
        backend.load(Path("./nowhere/at/all"))
    with pytest.raises(ArgumentError, match="safe_serialisation"):
        backend.load(path).save_pretrained(path, safe_serialisation=True)


def test_models_that_stay_in_their_files_are_pytorchs(backend, path):
    plain = backend.run(backend.load(path, offload="auto"), input_ids=IDS).logits
    for arguments in ({"offload": True}, {"device_map": "disk"}):
        if backend.name == "torch":
            logits = backend.run(backend.load(path, **arguments), input_ids=IDS).logits
            np.testing.assert_array_equal(logits, plain)
        else:
            with pytest.raises(ConfigError, match=r"offload: expected False: .* PyTorch's models"):
                backend.load(path, **arguments)


def test_misshapen_weights_are_made_anew_where_that_is_asked_for(backend, folder):
    path = folder(CONFIGS["pre_ln"].replace(num_labels=4), "sequence_classification")
    with pytest.raises(RuntimeError, match=r"score.weight \(expected \[7, 32\], received \[4, 32"):
        backend.load(path, "sequence_classification", num_labels=7)
    with pytest.warns(UserWarning, match="score.weight has shape .4, 32., not .7, 32.") as caught:
        model, info = backend.load(
            path, "sequence_classification", num_labels=7, ignore_mismatched_sizes=True,
            output_loading_info=True,
        )  # fmt: skip
    assert [w.filename for w in caught if "score" in str(w.message)] == [backend_file()]
    assert info["mismatched_keys"] == [("score.weight", (4, 32), (7, 32))]
    assert backend.run(model, input_ids=IDS).logits.shape == (1, 7)
    assert model.config.id2label[6] == "LABEL_6"
    with warnings.catch_warnings(record=True):
        smaller = backend.load(path, "none", vocab_size=80, ignore_mismatched_sizes=True)
    assert backend.run(smaller, input_ids=IDS).last_hidden_state.shape == (1, 6, 32)
    model.config.num_labels = 3
    with pytest.raises(ConfigError, match="num_labels=3 was set on a model made with 7"):
        backend.run(model, input_ids=IDS)


def backend_file() -> str:
    """The file that a warning about a model loaded by a test's adapter points at."""
    return str(Path(__file__).parents[1] / "support" / "backends.py")


FORMATS = {
    "torch": [
        "tf_post_ln_sharded",
        "flax_post_ln",
        "flax_post_ln_safetensors",
        "keras_hub_float32",
    ],
    "tf": ("flax_post_ln",),
    "flax": ("tf_post_ln_sharded",),
}


def test_folders_of_other_formats_are_read_as_they_are(backend):
    for name in FORMATS[backend.name]:
        expected = np.load(RECORDED / name / "expected.npz")
        logits = backend.run(backend.load(RECORDED / name), input_ids=expected["ids"]).logits
        np.testing.assert_allclose(logits, expected["logits"], atol=2e-5)


def test_set_fields_take_effect_and_shapes_are_guarded(backend, folder):
    path = folder(CONFIGS["pre_ln"].replace(num_labels=3), "sequence_classification")
    model = backend.load(path, "sequence_classification")
    ids = np.array([[5, 9, 77, 33, 33, 33]], np.int32)
    last = backend.run(model, input_ids=ids).logits
    model.config.pad_token_id = 33
    shorter = backend.run(model, input_ids=ids).logits
    other_end = np.array([[5, 9, 77, 4, 4, 33]], np.int32)
    model.config.pad_token_id = 4  # the last token that is none is the last one then
    assert np.abs(backend.run(model, input_ids=other_end).logits - shorter).max() > 1e-3
    model.config.pad_token_id = 33
    assert np.abs(shorter - last).max() > 1e-3
    model.config.hidden_size = 7
    for use in (lambda: model(ids), lambda: model.save_pretrained(path / "x")):
        with pytest.raises(ConfigError, match="hidden_size=7 was set on a model made with 32"):
            use()
    model.config.hidden_size = 32
    np.testing.assert_array_equal(backend.run(model, input_ids=ids).logits, shorter)


def test_a_configuration_makes_the_model_it_says(backend, folder):
    config = OPTConfig.from_pretrained(folder(CONFIGS["pre_ln"]))
    config.gradient_checkpointing, config._attn_implementation = True, "eager"
    model = backend.model_class("causal_lm")(config)
    assert model.config is config
    assert model.get_decoder().gradient_checkpointing
    assert model.attn_implementation == "eager"
    other = backend.model_class("none")(config, attn_implementation="sdpa")
    assert other.attn_implementation == other.config._attn_implementation == "sdpa"
    assert config._attn_implementation == "eager"


def test_save_pretrained_with_transformers_arguments(backend, path, tmp_path):
    model = backend.load(path)
    model.save_pretrained(
        save_directory=tmp_path / "a", is_main_process=True, save_function=None, push_to_hub=False,
        safe_serialization=True, variant=None, token=None,
    )  # fmt: skip
    again = backend.run(backend.load(tmp_path / "a"), input_ids=IDS).logits
    np.testing.assert_array_equal(again, backend.run(model, input_ids=IDS).logits)
    model.save_pretrained(tmp_path / "b", is_main_process=False)
    assert not (tmp_path / "b").exists()
    saved = json.loads((tmp_path / "a" / "config.json").read_text())
    assert saved["architectures"] == ["OPTForCausalLM"]
    assert "_attn_implementation" not in saved
    model.save_pretrained(tmp_path / "a", variant="v2", max_shard_size="20kB")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert {"model.safetensors", "model.safetensors.index.v2.json"} <= names
    again = backend.run(backend.load(tmp_path / "a", variant="v2"), input_ids=IDS).logits
    np.testing.assert_array_equal(again, backend.run(model, input_ids=IDS).logits)
    if backend.name != "torch":
        with pytest.raises(ArgumentError, match=r"opt-lm convert .* --to (tf-h5|flax-msgpack)"):
            model.save_pretrained(tmp_path / "b", safe_serialization=False)
