"""Folders that trainers leave are read where that is safe; elsewhere it is said what to run."""

import os
import pickle
import shutil
import socket
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import conversion
import opt_torch
from conversion.readers import open_any_checkpoint
from opt_cli.main import main
from opt_core.checkpoints.plan import plan_load
from opt_core.errors import CheckpointError
from tests.support.files.checkpoint_fixtures import (
    EMBEDDING,
    PROJECTED,
    TINY,
    assert_same,
    loaded,
    random_weights,
    write,
    write_torch_file,
)
from tests.support.files.metaseq_fixtures import fake, forget
from tests.support.files.training_folders import (
    by_grid,
    by_rows,
    in_parts,
    save_deepspeed,
    save_distributed,
)
from tests.support.tiers import tiered


def tensors(weights: Any) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in weights.items()}


def assert_read(path: Path, weights: Any, config: Any = TINY) -> Any:
    found = open_any_checkpoint(path)
    plan = plan_load(found.checkpoint, found.read_config(), "causal_lm")
    assert plan.config == config
    assert_same(loaded(plan), weights)
    for spec, tensor in plan.entries:
        half = tensor.rows(1, 1 + tensor.shape[0] // 2).read()
        np.testing.assert_array_equal(half, weights[spec.name][1 : 1 + tensor.shape[0] // 2])
    return found


OPTIMIZER = {
    "state": {0: {"step": torch.ones(()), "exp_avg": torch.ones(3)}},
    "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95), "params": [0]}],
}
CUTS = {"whole": torch.from_numpy, "rows": lambda array: by_rows(array, 3), "grid": by_grid}
AROUND = {
    "alone": lambda state: state,
    "accelerate's": lambda state: {"model": state},
    "with its optimizer": lambda state: {
        "model": state,
        "optim": OPTIMIZER,
        "step": 3,
        "seen": torch.ones(2),
    },
    "of an application": lambda state: {"app": {"model": state, "optim": OPTIMIZER}},
}


@pytest.mark.parametrize(
    ("cut", "around"),
    tiered(product(CUTS, AROUND), lambda cut, around: cut == "grid" or around == "alone"),
)
def test_distributed_checkpoints_of_torch(cut: str, around: str, tmp_path: Path):
    weights = random_weights(PROJECTED)
    state = {name: CUTS[cut](array) for name, array in weights.items()}
    state["lm_head.weight"] = state[EMBEDDING]
    PROJECTED.save_pretrained(tmp_path)
    name = "pytorch_model_0" if around == "accelerate's" else "pytorch_model_fsdp_0"
    folder = save_distributed(tmp_path / name, AROUND[around](state))
    save_distributed(tmp_path / "optimizer_0", {"optimizer": OPTIMIZER})
    torch.save(OPTIMIZER, tmp_path / "scheduler.pt")
    for path in (folder, tmp_path):
        found = assert_read(path, weights, PROJECTED)
        assert found.checkpoint.format == "torch-distributed"
        assert not found.notes


def test_distributed_checkpoints_convert_and_are_described(tmp_path: Path):
    weights = random_weights(dtype="bfloat16")
    state = {f"module.{n}": torch.from_numpy(a.view(np.int16)) for n, a in weights.items()}
    state = {name: tensor.view(torch.bfloat16) for name, tensor in state.items()}
    TINY.save_pretrained(tmp_path)
    save_distributed(tmp_path / "pytorch_model_fsdp_0", {"model": state})
    told = conversion.describe(tmp_path)
    assert (told.format, told.problems) == ("torch-distributed", ())
    assert told.files.keys() == {".metadata", "__0_0.distcp"}
    assert "module." in told.notes[0]
    done = conversion.convert(tmp_path, tmp_path / "new")
    assert done.source_format == "torch-distributed"
    assert "module." in done.notes[0]
    assert_read(tmp_path / "new", weights, TINY.replace(dtype="bfloat16"))


@pytest.mark.slow
def test_two_processes_of_fsdp(tmp_path: Path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "pytorch_model_fsdp_0"
    command = [sys.executable, "-m", "tests.support.files.training_folders", str(folder), str(port)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()})
    PROJECTED.save_pretrained(tmp_path)
    model = opt_torch.OPTForCausalLM(PROJECTED, seed=3)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    del state["lm_head.weight"]
    found = assert_read(tmp_path, state, PROJECTED)
    assert {path.name for path in found.checkpoint.files} >= {"__0_0.distcp", "__1_0.distcp"}


class Runs:
    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call[0], self.call[1:]


def distributed(folder: Path, **changes: Any) -> Any:
    """A sound checkpoint, whose metadata may then be changed by the class that it is."""
    TINY.save_pretrained(folder)
    state = {name: by_rows(array, 2) for name, array in random_weights().items()}
    save_distributed(folder, state)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for key, change in changes.items():
        change(getattr(metadata, key))
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return metadata


def first_of(places: Any) -> Any:
    return next(place for index, place in places.items() if index.fqn == EMBEDDING)


HUGE = torch.Size([2**62 - 1, 8])
HOSTILE = {
    "runs": (
        {"planner_data": lambda data: data.update(x=Runs(os.system, "touch RAN"))},
        "refused '(posix|nt).system'",
    ),
    "evaluates": (
        {"storage_data": lambda data: data.update(x=Runs(eval, "open('RAN', 'w')"))},
        r"refused 'builtins\.eval'",
    ),
    "another class": (
        {"planner_data": lambda data: data.update(x=fake("evil.module", "Class"))},
        r"refused 'evil\.module\.Class'",
    ),
    "a file elsewhere": (
        {"storage_data": lambda data: setattr(first_of(data), "relative_path", "../secret")},
        r"expected a file beside it, received '\.\./secret'",
    ),
    "a place behind the end": (
        {"storage_data": lambda data: setattr(first_of(data), "offset", 10**12)},
        "it is truncated",
    ),
    "a negative place": (
        {"storage_data": lambda data: setattr(first_of(data), "offset", -4)},
        "no place or size",
    ),
    "a compressed part": (
        {"storage_data": lambda data: setattr(first_of(data), "transform_descriptors", ["zstd"])},
        r"compressed: .*format_utils",
    ),
    "a missing part": (
        {"storage_data": lambda data: data.pop(next(i for i in data if i.fqn == EMBEDDING))},
        "some of its 1 parts are missing",
    ),
    "another size": (
        {"state_dict_metadata": lambda data: setattr(data[EMBEDDING], "size", torch.Size([22, 8]))},
        "some of its 2 parts are missing",
    ),
    "a size beyond all": (
        {
            "state_dict_metadata": lambda d: setattr(
                d[EMBEDDING], "size", torch.Size([2**62 - 1, 8])
            )
        },
        "parts are missing",
    ),
    "no state": (
        {"state_dict_metadata": lambda data: data.clear()},
        "no weights of a model",
    ),
}


@pytest.mark.parametrize("how", HOSTILE)
def test_metadata_that_is_not_what_torch_writes(how: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    changes, message = HOSTILE[how]
    distributed(tmp_path / "model", **changes)
    forget()
    with pytest.raises(CheckpointError, match=message) as caught:
        open_any_checkpoint(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "RAN").exists()


def test_files_of_a_distributed_checkpoint_that_are_damaged(tmp_path: Path):
    distributed(tmp_path)
    for name in (".metadata", "__0_0.distcp"):
        content = (tmp_path / name).read_bytes()
        for size in (0, 1, 7, len(content) // 3, len(content) // 2, len(content) - 5):
            (tmp_path / name).write_bytes(content[:size])
            with pytest.raises(CheckpointError, match=r"metadata|distcp"):
                open_any_checkpoint(tmp_path)
        (tmp_path / name).unlink()
        with pytest.raises(CheckpointError, match=r"no weights|no such file"):
            open_any_checkpoint(tmp_path)
        (tmp_path / name).write_bytes(content)
    cube = in_parts(np.ones((2, 2, 2), np.float32), [((0, 0, i), (2, 2, 1)) for i in range(2)])
    save_distributed(tmp_path / "cube", {"model.x.y": cube})
    with pytest.raises(CheckpointError, match=r"along several dimensions: .*format_utils"):
        open_any_checkpoint(tmp_path / "cube")


def test_weights_without_a_configuration(tmp_path: Path):
    save_distributed(tmp_path / "a" / "b" / "c" / "d", tensors(random_weights()))
    found = open_any_checkpoint(tmp_path / "a" / "b" / "c" / "d")
    assert_same(loaded(plan_load(found.checkpoint, TINY, "causal_lm")), random_weights())
    with pytest.raises(CheckpointError, match=r"no config\.json with these weights: copy that of"):
        found.read_config()
    TINY.save_pretrained(tmp_path / "a" / "b")
    assert_read(tmp_path / "a" / "b" / "c" / "d", random_weights())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeeds_folders_that_have_the_whole_model(stage: int, dtype: str, tmp_path: Path):
    weights = random_weights(dtype=dtype)
    both = {**weights, "lm_head.weight": weights[EMBEDDING]}
    save_deepspeed(tmp_path, both, stage)
    TINY.save_pretrained(tmp_path)
    step = tmp_path / "global_step20"
    for path in (tmp_path, step, step / "mp_rank_00_model_states.pt"):
        found = assert_read(path, weights)
        assert found.checkpoint.format == "deepspeed"
        assert ("zero_to_fp32.py" in " ".join(found.notes)) == (dtype == "float16")
    (tmp_path / "zero_to_fp32.py").unlink()
    assert_read(tmp_path, weights)
    (tmp_path / "latest").unlink()
    shutil.copytree(step, tmp_path / "global_step3")
    assert open_any_checkpoint(tmp_path).checkpoint.files[0].parent == step
    assert conversion.convert(tmp_path, tmp_path / "new").source_format == "deepspeed"
    assert_read(tmp_path / "new", weights, TINY.replace(dtype=dtype))


def test_deepspeeds_folders_that_its_script_joins(tmp_path: Path):
    def refused(message: str, path: Path = tmp_path) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            open_any_checkpoint(path)
        assert "\n" not in str(caught.value)

    save_deepspeed(tmp_path / "3", random_weights(), 3)
    refused(r"ZeRO-3 keeps .* `python zero_to_fp32\.py \. OUTPUT`", tmp_path / "3")
    refused("weights are in 3: give that folder")
    save_deepspeed(tmp_path, random_weights())
    states = tmp_path / "global_step20" / "mp_rank_00_model_states.pt"
    shutil.copy(states, states.with_name("mp_rank_01_model_states.pt"))
    refused("found 2: the parts of a parallel model")
    states.with_name("mp_rank_01_model_states.pt").unlink()
    torch.save({"module": {name: torch.empty(0) for name in random_weights()}}, states)
    refused("tensors without elements: ZeRO-3")
    torch.save({"module": {"a": 3}}, states)
    refused("expected a dict of tensors under 'module'")
    (tmp_path / "latest").write_text("../elsewhere\n")
    refused("expected the name of a folder with model states, received '../elsewhere'")


def test_lightnings_checkpoints_and_other_dicts_of_torch(tmp_path: Path):
    weights = random_weights()
    TINY.save_pretrained(tmp_path)
    state = {f"model._orig_mod.{name}": tensor for name, tensor in tensors(weights).items()}
    content = {
        "epoch": 1,
        "state_dict": state,
        "hyper_parameters": fake("lightning_module", "Arguments", lr=1e-4),
        "callbacks": {"ModelCheckpoint{'monitor': None}": {"best_k_models": {}}},
        "optimizer_states": [OPTIMIZER],
    }
    torch.save(content, tmp_path / "epoch=1-step=20.ckpt")
    torch.save(OPTIMIZER, tmp_path / "optimizer.pt")
    forget()
    for path in (tmp_path, tmp_path / "epoch=1-step=20.ckpt"):
        found = assert_read(path, weights)
        assert found.checkpoint.format == "torch-bin"
        assert "without model., _orig_mod. in them" in found.notes[0]
    torch.save({"model_state_dict": tensors(weights), "epoch": 3}, tmp_path / "last.pt")
    assert_read(tmp_path / "last.pt", weights)
    with pytest.raises(CheckpointError, match=r"found epoch=1-step=20, last; give one of these"):
        open_any_checkpoint(tmp_path)
    torch.save(opt_torch.OPTForCausalLM(TINY), tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match=r"a pickled opt_torch\S*OPTForCausalLM, not its wei"):
        open_any_checkpoint(tmp_path / "whole.pt")


def test_accelerates_folders(tmp_path: Path):
    accelerate: Any = pytest.importorskip("accelerate")
    model = opt_torch.OPTForCausalLM(TINY, seed=1)
    weights = {name: tensor.detach().numpy() for name, tensor in model.named_parameters()}
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(model)
    for i, safe in enumerate((True, False)):
        accelerator.save_state(str(tmp_path / str(i)), safe_serialization=safe)
        TINY.save_pretrained(tmp_path / str(i))
        assert_read(tmp_path / str(i), weights)
    accelerator.save_model(prepared, str(tmp_path / "2"), max_shard_size="2KB")
    TINY.save_pretrained(tmp_path / "2")
    assert_read(tmp_path / "2", weights)
    (tmp_path / "3").mkdir()
    write_torch_file(tmp_path / "3" / "pytorch_model_fsdp.bin", weights)
    TINY.save_pretrained(tmp_path / "3")
    assert_read(tmp_path / "3", weights)


def test_the_language_model_of_blip_2(tmp_path: Path):
    transformers: Any = pytest.importorskip("transformers")
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    small["intermediate_size"] = 8
    text = {k: v for k, v in TINY.to_dict().items() if k not in ("torch_dtype", "dtype")}
    config = transformers.Blip2Config(
        vision_config={**small, "image_size": 28},
        qformer_config={**small, "encoder_hidden_size": 8},
        text_config=text,
    )
    model = transformers.Blip2ForConditionalGeneration(config)
    weights = random_weights()
    both = {**weights, "lm_head.weight": weights[EMBEDDING]}
    model.language_model.load_state_dict(tensors(both))
    model.save_pretrained(tmp_path / "theirs")
    arguments = ["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]
    with pytest.raises(SystemExit) as done:
        main([*arguments, "--prefix", "language_model."])
    assert not done.value.code
    found = open_any_checkpoint(tmp_path / "ours")
    plan = plan_load(found.checkpoint, found.read_config(), "causal_lm")
    assert_same(loaded(plan), weights)
    assert plan.config.replace(dtype=None) == TINY
    TINY.save_pretrained(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match=r"convert --prefix language_model\.` takes it"):
        conversion.convert(tmp_path / "theirs", tmp_path / "not")


def test_a_described_pair_counts_once(tmp_path: Path):
    weights = random_weights()
    TINY.save_pretrained(tmp_path)
    expected = conversion.describe(write(tmp_path, weights)).parameters
    renamed = {n.replace(EMBEDDING, "lm_head.weight"): a for n, a in weights.items()}
    assert conversion.describe(write(tmp_path, renamed)).parameters == expected
    write(tmp_path, {**weights, "lm_head.weight": weights[EMBEDDING]})
    assert conversion.describe(tmp_path).parameters == expected


def test_a_train_state_of_flax(tmp_path: Path):
    serialization: Any = pytest.importorskip("flax.serialization")
    weights = random_weights()
    TINY.save_pretrained(write(tmp_path / "source", weights))
    conversion.convert(tmp_path / "source", tmp_path / "flax", to="flax-msgpack")
    path = tmp_path / "flax" / "flax_model.msgpack"
    params = serialization.msgpack_restore(path.read_bytes())
    moments = {"0": {"count": np.zeros((), np.int32), "mu": params, "nu": params}, "1": None}
    path.write_bytes(serialization.to_bytes({"step": 3, "params": params, "opt_state": moments}))
    assert_read(tmp_path / "flax", weights, TINY.replace(dtype="float32"))
