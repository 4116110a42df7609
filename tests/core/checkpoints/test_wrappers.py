"""Files as trainers leave them: one name of a tied pair, wrapped names, heads of their own."""

import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.checkpoints.pretrained import open_pretrained
from opt_core.errors import CheckpointError
from opt_core.params import Head
from tests.support.files.checkpoint_fixtures import (
    EMBEDDING,
    PROJECTED,
    TINY,
    UNTIED,
    WRITERS,
    assert_same,
    loaded,
    plan,
    random_weights,
    write,
    write_index,
    write_plain_safetensors,
    write_sharded,
    write_torch_file,
)

LM_HEAD = "lm_head.weight"
HEADS: list[Head] = ["none", "causal_lm", "sequence_classification", "question_answering"]


def only_head(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A tied pair as safetensors' save_model keeps it: under its alphabetically first name."""
    rest = {name: array for name, array in weights.items() if name != EMBEDDING}
    return {LM_HEAD: weights[EMBEDDING], **rest}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", WRITERS)
def test_either_name_of_a_tied_pair_is_both(tmp_path, name, head):
    for config in (TINY, PROJECTED):
        weights = random_weights(config, head)
        folder = write(tmp_path / str(config.embed_dim), only_head(weights), name)
        result = plan(folder, config, head)
        assert_same(loaded(result), weights)
        assert result.config.tie_word_embeddings
        assert not result.fresh


def test_an_index_that_lists_both_names_of_a_pair_whose_file_has_one(tmp_path):
    weights = random_weights()
    for present, absent in ((EMBEDDING, LM_HEAD), (LM_HEAD, EMBEDDING)):
        kept = only_head(weights) if present == LM_HEAD else weights
        folder = write_sharded(tmp_path / present, kept)
        index = folder / "model.safetensors.index.json"
        places = json.loads(index.read_text())["weight_map"]
        write_index(index, {**places, absent: places[present]})
        assert_same(loaded(plan(folder)), weights)


@pytest.mark.parametrize("missing", [EMBEDDING, LM_HEAD])
def test_an_untied_model_needs_both(tmp_path, missing):
    weights = random_weights(UNTIED)
    del weights[missing]
    message = rf"1 missing: {re.escape(missing)}\. .* set tie_word_embeddings to true"
    with pytest.raises(CheckpointError, match=message):
        plan(write(tmp_path, weights), UNTIED)


WRAPPED = {
    "DataParallel": "module.{}",
    "torch.compile": "_orig_mod.{}",
    "FSDP": "_fsdp_wrapped_module.{}",
    "Lightning": "model.{}",
    "Lightning's strategies": "_forward_module.model._orig_mod.{}",
    "all at once": "model.module._fsdp_wrapped_module._orig_mod.module.{}",
    "PEFT, merged": "base_model.model.{}",
    "TRL": "pretrained_model.{}",
    "a class of the user's": "policy.llm.{}",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_of_wrapped_models(tmp_path, how):
    weights = random_weights(UNTIED)
    folder = write(tmp_path, {WRAPPED[how].format(n): a for n, a in weights.items()})
    checkpoint = open_checkpoint(folder)
    assert_same(loaded(plan_load(checkpoint, UNTIED, "causal_lm")), weights)
    (note,) = checkpoint.notes
    parts = WRAPPED[how].removesuffix(".{}").split(".")
    assert all(f"{part}." in note.removeprefix(str(folder)) for part in parts)


def test_wrappers_inside_names_and_of_a_bare_decoder(tmp_path):
    def inside(name: str) -> str:
        name = re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", name)
        name = name.replace("self_attn.", "self_attn._fsdp_wrapped_module.")
        return name.replace("q_proj.", "q_proj.base_layer.").replace("model.", "module.model._f.")

    weights = random_weights()
    for i, rename in enumerate(
        [
            lambda name: inside(name).replace("_f.", "_orig_mod."),
            lambda name: name.removeprefix("model.decoder."),
            lambda name: name.replace("model.decoder.", "transformer.module.decoder."),
        ]
    ):
        folder = write(tmp_path / str(i), {rename(name): a for name, a in weights.items()})
        assert_same(loaded(plan(folder)), weights)


def test_what_is_around_everything_and_more_is_not_guessed(tmp_path):
    weights = random_weights()
    inner = {f"language_model.{name}": array for name, array in weights.items()}
    folder = write(tmp_path, {**inner, "vision_model.x": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"convert --prefix language_model\.` takes it"):
        plan(folder)
    part = open_checkpoint(folder, "language_model.")
    assert not part.notes
    assert_same(loaded(plan_load(part, TINY, "causal_lm")), weights)
    with pytest.raises(CheckpointError, match=r"no tensor's name begins with 'vision\.'"):
        open_checkpoint(folder, "vision.")
    two = {
        f"{who}.{name}": array for who in ("actor", "reference") for name, array in weights.items()
    }
    with pytest.raises(CheckpointError, match=r"--prefix actor\.` takes it"):
        plan(write(tmp_path / "two", two))
    encoder = {n.replace("model.decoder", "encoder"): array for n, array in weights.items()}
    with pytest.raises(CheckpointError, match=r"36 missing.*36 unexpected"):
        plan(write(tmp_path / "encoder", encoder))
    weights[f"module.{EMBEDDING}"] = weights[EMBEDDING]
    with pytest.raises(CheckpointError, match="are both model"):
        open_checkpoint(write(tmp_path / "twice", weights))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    ("value_head", "wrapper"),
    [
        (("v_head.summary.weight", "v_head.summary.bias"), ""),
        (("v_head.summary.weight", "v_head.summary.bias"), "pretrained_model."),
        (("v_head.weight",), "rwtransformer."),
        (("module.v_head.weight",), "module.rwtransformer."),
        (("value_head.weight",), "model."),
    ],
)
def test_value_heads_are_left_aside_by_name(tmp_path, value_head, wrapper, head):
    weights = random_weights(TINY, head)
    own = "model." if "rwtransformer" in wrapper else ""  # which is a model without a head
    theirs = {wrapper + name.removeprefix(own): array for name, array in weights.items()}
    theirs |= {name: np.ones((1, 8), np.float32) for name in value_head}
    TINY.save_pretrained(tmp_path)
    write(tmp_path, theirs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        source = open_pretrained(head, tmp_path, "auto", None, None)
    assert_same({spec.name: array for spec, array in source.stream(None)}, weights)
    *_, aside = map(str, (warning.message for warning in caught))
    assert len(caught) == 1 + bool(wrapper)
    assert all(name in aside for name in value_head)


TRAINERS = [("state_dict",), ("model",), ("model_state_dict",), ("module",), ("net", "state_dict")]


@pytest.mark.parametrize("keys", TRAINERS)
def test_dicts_around_the_weights(tmp_path, keys):
    torch: Any = pytest.importorskip("torch")
    weights = random_weights()
    content: Any = {f"module.{name}": torch.from_numpy(array) for name, array in weights.items()}
    for key in reversed(keys):
        state = {0: {"step": torch.ones(())}}
        optimizer = {"state": state, "param_groups": [{"betas": (0.9, 0.95)}]}
        content = {"epoch": 3, "optimizer": optimizer, key: content, "rng": torch.ones(5)}
    torch.save(content, tmp_path / "pytorch_model.bin")
    assert_same(loaded(plan(tmp_path)), weights)


def test_a_file_is_what_it_holds_and_not_what_it_is_called(tmp_path):
    weights = random_weights()
    write_torch_file(tmp_path / "model.safetensors", weights)
    assert open_checkpoint(tmp_path).format == "torch-bin"
    assert_same(loaded(plan(tmp_path)), weights)
    (tmp_path / "model.safetensors").unlink()
    write_plain_safetensors(tmp_path / "pytorch_model.bin", weights)
    assert open_checkpoint(tmp_path).format == "safetensors"
    assert_same(loaded(plan(tmp_path)), weights)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"Entry not found", r"a text that begins with 'Entry not found', not weights; download"),
        (
            b"<!DOCTYPE html>\n<html><head>" + b"x" * 9000,
            "begins with '<!DOCTYPE html>', not weights",
        ),
        (b"", "empty"),
    ],
)
def test_downloads_that_are_something_else(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


def test_folders_that_have_their_weights_elsewhere(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_checkpoint(tmp_path)
        assert "\n" not in str(caught.value)

    (tmp_path / "adapter_config.json").write_text("{}")
    refused(r"adapter_config\.json is of an adapter: load the model that it is for")
    for step in (500, 1000, 90):
        write(tmp_path / f"checkpoint-{step}", {"a": np.ones(1, np.float32)})
    refused("weights are in checkpoint-1000, as in 2 others: give that folder")
    for name in ("model_1.safetensors", "optimizer.bin", "training_args.bin"):
        (tmp_path / name).touch()
    refused(r"found model_1\.safetensors: give the path of the file")
    (tmp_path / "global_step7").mkdir()
    refused("found global_step7: `opt-lm convert` reads these")


def test_weights_of_other_kinds_are_named(tmp_path):
    for i, (extra, message) in enumerate(
        {
            "model.decoder.layers.0.fc1.lora_A.default.weight": "not merged",
            "model.decoder.layers.0.fc1.lora_right_weight": "not merged",
            "model.decoder.layers.0.fc1.SCB": "another library quantised",
            "model.decoder.layers.0.fc1.weight.absmax": "another library quantised",
        }.items()
    ):
        weights = {**random_weights(), extra: np.ones((1, 8), np.float32)}
        with pytest.raises(CheckpointError, match=message):
            plan(write(tmp_path / str(i), weights))
    integers = {name: array.astype(np.int8) for name, array in random_weights().items()}
    with pytest.raises(CheckpointError, match=r"36 of another type: .* without their scales"):
        plan(write(tmp_path / "integers", integers))
    empty = {name: np.ones(0, np.float32) for name in random_weights()}
    with pytest.raises(CheckpointError, match=r"ZeRO-3 .* zero_to_fp32\.py"):
        plan(write(tmp_path / "zero", empty, "pytorch_model.bin"))
