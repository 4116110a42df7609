"""Settings and tensors of adapters that are not honoured or do not fit: one line that names them.

Those honoured are compared with live PEFT in tests/torch/test_adapters.py.
"""

import json
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from opt_core.adapters.folders import split_adapter, tokenizer_folder
from opt_core.adapters.merging import AdaptedTensor, merge_adapter
from opt_core.adapters.tensors import read_adapter
from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.hub import model_files
from opt_core.training.lora import Adapter, save_adapter

CONFIG = OPTConfig(
    hidden_size=8, num_attention_heads=2, num_hidden_layers=2, ffn_dim=12, vocab_size=20
)
HEAD = "sequence_classification"
PREFIX = "base_model.model.model.decoder.layers"


@pytest.fixture
def base(folder):
    return folder(CONFIG)


@pytest.fixture
def adapter(base, tmp_path):
    path, rng = tmp_path / "adapter", np.random.default_rng(0)
    settings = Adapter(3, 6.0, ("fc1", "q_proj"))
    save_adapter(path, CONFIG, HEAD, settings, lambda s: rng.random(s.shape), str(base))
    return path


def change(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def merged(base, folder, head: Any = HEAD):
    plan = plan_load(open_checkpoint(base), OPTConfig.from_pretrained(base), head)
    return merge_adapter(plan, head, read_adapter(folder))


def test_what_is_written_is_read(base, adapter):
    tensors = load_file(adapter / "adapter_model.safetensors")
    original = load_file(base / "model.safetensors")
    for spec, tensor in merged(base, adapter).entries:
        key = f"base_model.model.{spec.name.removesuffix('.weight')}"
        expected: Any = tensors.get(f"{key}.weight", original.get(spec.name))
        if f"{key}.lora_A.weight" in tensors:
            assert isinstance(tensor, AdaptedTensor)
            expected += 2 * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
            np.testing.assert_array_equal(tensor.rows(1, 5).rows(1, 3).read(), tensor.read()[2:4])
        np.testing.assert_allclose(tensor.read(), expected, atol=1e-6, err_msg=spec.name)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected 'LORA', found 'IA3'"),
        ({"peft_type": None}, "peft_type: expected 'LORA', found None"),
        ({"bias": "some"}, "bias: expected none, all or lora_only, found 'some'"),
        ({"layer_replication": [[0, 2]]}, r"layer_replication=\[\[0, 2\]\] is not supported"),
        ({"arrow_config": {"top_k": 2}}, "arrow_config=.* is not supported"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens=.* is not supported"),
        ({"megatron_config": {"a": 1}}, "megatron_config=.* is not supported"),
        ({"init_lora_weights": "pissa_niter_16"}, 'init_lora_weights="pissa_niter_16" changed'),
        ({"init_lora_weights": "corda"}, 'init_lora_weights="corda" changed'),
        ({"init_lora_weights": "loftq"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "merge_and_unload"),
        ({"r": 0}, "r: expected an integer >= 1, found 0"),
        ({"lora_alpha": "x"}, "lora_alpha: expected a number, found 'x'"),
        ({"use_dora": "yes"}, "use_dora: expected true or false, found 'yes'"),
        ({"rank_pattern": [1]}, "rank_pattern: expected an object"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: expected a regular expression"),
        ({"target_modules": [1]}, "target_modules: expected a list of names"),
        ({"target_modules": "["}, "target_modules: expected a regular expression"),
        ({"modules_to_save": ["*"]}, "modules_to_save: expected a regular expression"),
        ({"layers_to_transform": ["a"]}, "layers_to_transform: expected a list of integers"),
        ({"trainable_token_indices": [-1]}, "trainable_token_indices: expected a list of integ"),
        ({"r": 4}, r"lora_A.weight: expected \[4, 8\], found \[3, 8\]"),
        ({"target_modules": ["fc1"]}, "does not fit the model: unexpected .*q_proj.lora_A"),
        ({"target_modules": ["fc1", "fc2", "q_proj"]}, "missing .*fc2.lora_A"),
        ({"use_dora": True}, "missing .*lora_magnitude_vector"),
        ({"modules_to_save": ["score", "embed_positions"]}, "missing .*embed_positions.weight"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices does not fit"),
        ({"layers_to_transform": [1]}, "unexpected .*layers.0.*q_proj.lora_A"),
        ({"r": 2, "use_qalora": True}, "use_qalora on a quantised model"),
    ],
    ids=str,
)
def test_what_is_refused(base, adapter, changes, message):
    change(adapter, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        merged(base, adapter)
    assert "\n" not in str(error.value)


def test_what_is_unknown_is_named(base, adapter):
    change(adapter, velora_config=None, qalora_group_size=16, trainer_note="x")
    with pytest.warns(UserWarning, match="adapter_config.json: trainer_note: unknown here"):
        merged(base, adapter)


def test_missing_files_and_tensors(base, adapter, tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_config\.json: no such file"):
        read_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"unexpected base_model\.model\.score\.weight"):
        merged(base, adapter, "causal_lm")
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    for lost in ("base_model.model.score.weight", f"{PREFIX}.1.fc1.lora_B.weight"):
        save_file({name: value for name, value in tensors.items() if name != lost}, path)
        with pytest.raises(CheckpointError, match=f"missing {lost}"):
            merged(base, adapter)
    more = {
        f"{PREFIX}.0.fc1.lora_C.weight": r"unexpected .*lora_C",
        f"{PREFIX}.0.fc2.lora_A.weight": r"unexpected .*fc2.lora_A.weight",
        f"{PREFIX}.0.fc2.lora_B.bias": r"unexpected .*fc2.lora_B.bias",
        f"{PREFIX}.0.fc2.lora_magnitude_vector": r"unexpected .*fc2.lora_magnitude_vector",
        f"{PREFIX}.0.fc2.gain": r"unexpected .*fc2.gain",
        "base_model.model.model.decoder.embed_tokens.weight": r"expected \[20, 8\], found \[1\]",
    }
    for name, message in more.items():
        save_file(tensors | {name: np.zeros(1)}, path)
        with pytest.raises(CheckpointError, match=message):
            merged(base, adapter)
    save_file(tensors | {f"{PREFIX}.0.fc2.bias": np.zeros(8, np.int32)}, path)
    with pytest.raises(CheckpointError, match=r"fc2.bias: int32 is no floating-point type"):
        merged(base, adapter)
    save_file(
        {
            n.replace("_A.", "_A.default.").replace("_B.", "_B.default."): v
            for n, v in tensors.items()
        },
        path,
    )  # as a trainer's own checkpoint has them
    merged(base, adapter)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: no such file"):
        merged(base, adapter)


def test_from_a_folder_to_its_model(base, adapter, tmp_path):
    path, found = split_adapter(adapter)
    assert path == base
    assert found is not None
    assert split_adapter(adapter / "adapter_model.safetensors")[0] == base
    assert split_adapter(base) == (base, None)
    assert split_adapter(base, adapter)[0] == base
    assert tokenizer_folder(adapter) == tokenizer_folder(base, adapter) == base
    (adapter / "vocab.json").touch()
    assert tokenizer_folder(adapter) == tokenizer_folder(base, adapter) == adapter
    with pytest.raises(CheckpointError, match="no model, but adapters in adapter; name one"):
        split_adapter(tmp_path)
    with pytest.raises(CheckpointError, match=r"no adapter_config\.json; expected the folder of"):
        split_adapter(base, base)
    with pytest.raises(CheckpointError, match="an adapter itself; merge it first"):
        split_adapter(adapter, adapter)
    other = tmp_path / "other"
    other.mkdir()
    for file in adapter.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    change(other, base_model_name_or_path=str(adapter))
    with pytest.raises(CheckpointError, match="is an adapter too; merge that one first"):
        split_adapter(other)


def test_a_repository_of_an_adapter():
    names = ["README.md", "adapter_config.json", "adapter_model.bin", "tokenizer.json"]
    assert model_files(names, "me/it") == names[1:]
    assert model_files([*names, "adapter_model.safetensors"], "me/it") == [
        "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"
    ]  # fmt: skip
