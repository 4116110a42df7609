"""All that a PyTorch model computes, on a mesh or without; `tests/torch/test_sharding.py` compares.

As a program it is one process of several, which share models on one mesh after the other and write
down what each of them found.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import opt_torch
from opt_core.checkpoints.save import save_checkpoint
from opt_core.config import OPTConfig
from opt_core.params import Head, param_specs
from opt_core.training.config import TrainConfig
from opt_torch import checkpoint, distribution, lora, scoring, sharding, training
from tests.support.configs import CONFIGS
from tests.support.oracle import random_params
from tests.support.reference import HEADS, make_mask, make_prompts

UNTIED = CONFIGS["pre_ln"].replace(tie_word_embeddings=False)
KINDS = {**CONFIGS, "untied": UNTIED}
"""Configurations by name."""

ROWS, LENGTH = 4, 9
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"max_new_tokens": 64},
    "sampled": {"do_sample": True, "top_k": 20, "num_return_sequences": 2, "max_new_tokens": 10},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 10},
    "lookup": {"prompt_lookup_num_tokens": 3, "max_new_tokens": 10},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 3, "max_new_tokens": 5},
}
TRAININGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "parts": {"gradient_accumulation_steps": 2, "batch_size": 8, "gradient_checkpointing": True},
    "frozen": {"freeze": ("model.decoder.layers.0.*",), "label_smoothing": 0.1},
    "lora": {"lora_rank": 4, "lora_targets": ("q_proj", "out_proj", "fc1", "fc2")},
}
Found = dict[str, NDArray[Any]]
Parts = tuple[str, ...]
SOME: Parts = ("sampled", "beams", "assistant", "streamed", "heads", "parts", "lora")
ALL: Parts = (*SETTINGS, "assistant", "streamed", "heads", *TRAININGS)
"""Names of the parts that are computed; a forward pass and its gradients always are."""


def compute(config: OPTConfig, home: Path, mesh: Any, parts: Parts) -> Found:
    """Everything that must not depend on the mesh, by name.

    Args:
        config: The models' configuration.
        home: Folder of the models that `save_models` wrote.
        mesh: The mesh; None: one process.
        parts: What of it, beside a forward pass and its gradients.
    """
    found = _forward(config, home, mesh)
    found |= _generation(config, home, mesh, parts)
    if "heads" in parts:
        found |= _heads(config, home, mesh)
    return found | _trainings(config, home, mesh, [name for name in TRAININGS if name in parts])


def save_models(config: OPTConfig, home: Path) -> None:
    """Writes a language model, the other heads and an assistant, all with random weights."""
    kinds: dict[str, Head] = {"OPTForCausalLM": "causal_lm", "assistant": "causal_lm", **HEADS}
    for seed, (name, head) in enumerate(kinds.items()):
        params = random_params(config, head, seed)
        fetch = {key: lambda value=value: value for key, value in params.items()}
        save_checkpoint(home / name, config, fetch, param_specs(config, head), "float32")
    model = opt_torch.OPTForCausalLM.from_pretrained(home / "OPTForCausalLM")
    model.save_pretrained(home / "bin", safe_serialization=False)


def prompts_of(config: OPTConfig, rows: int) -> NDArray[Any]:
    """Ids that have padding in the text, and its place in the second half of the vocabulary."""
    ids = make_prompts(config, rows, LENGTH)
    pad = config.pad_token_id or 0
    ids[0, 3:5] = [pad, -(-config.vocab_size // 2) + pad]
    return ids


def batch_of(config: OPTConfig) -> dict[str, NDArray[Any]]:
    """Eight rows with padding on the left; half of the processes may have rows without a label."""
    ids, mask = prompts_of(config, 8), make_mask("left", [9, 5, 2, 7, 9, 9, 3, 4])
    labels = np.where(mask, ids, -100)
    labels[4:6] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _load(name: str, home: Path, mesh: Any, folder: str = "", **options: Any) -> Any:
    return getattr(opt_torch, name).from_pretrained(home / (folder or name), mesh=mesh, **options)


def _array(values: Any) -> NDArray[Any]:
    return values.detach().numpy()


def _forward(config: OPTConfig, home: Path, mesh: Any) -> Found:
    model = _load("OPTForCausalLM", home, mesh)
    ids, mask = prompts_of(config, ROWS), make_mask("left", [9, 5, 2, 7])
    scores, likeliest = scoring.token_scores(model, ids, mask)
    halves = torch.ones(config.num_attention_heads)
    halves[::2] = 0.5
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        seen = model(ids, output_attentions=True, head_mask=halves)
    found = {
        "logits": _array(logits), "logits/scores": scores, "ids/likeliest": likeliest,
        "logits/attentions": _array(seen.attentions[-1]), "logits/head mask": _array(seen.logits),
    }  # fmt: skip
    loss = model(ids, attention_mask=mask, labels=np.where(mask, ids, -100)).loss
    loss.backward()
    for spec in param_specs(config):
        whole = distribution.own_gradient(checkpoint.locate(model, spec))
        whole = whole if mesh is None else distribution.gather(model, spec, whole)
        # The gradient of k_proj.bias is zero: what is there is rounding noise.
        if not spec.name.endswith("k_proj.bias"):
            found[f"gradients/{spec.name}"] = _array(whole)
    return found


def _generation(config: OPTConfig, home: Path, mesh: Any, parts: Parts) -> Found:
    model = _load("OPTForCausalLM", home, mesh)
    ids, mask = prompts_of(config, ROWS), make_mask("left", [9, 5, 2, 7])
    found: Found = {}
    for name in SETTINGS:
        if name in parts:
            settings = SETTINGS[name] if parts == ALL else SETTINGS[name] | {"max_new_tokens": 6}
            found[f"ids/{name}"] = _array(model.generate(ids, mask, seed=3, **settings))
    if "assistant" in parts:
        helper = _load("OPTForCausalLM", home, mesh, "assistant")
        drafted = {"assistant_model": helper, "max_new_tokens": 8, "do_sample": True, "seed": 5}
        found["ids/assistant"] = _array(model.generate(ids, mask, **drafted))
    if "streamed" in parts:
        streamed = [_array(token) for token in model.stream(ids, mask, max_new_tokens=4)]
        found["ids/streamed"] = np.stack(streamed, 1)
    return found


def _heads(config: OPTConfig, home: Path, mesh: Any) -> Found:
    ids, mask = prompts_of(config, ROWS), make_mask("left", [9, 5, 2, 7])
    found: Found = {}
    with torch.no_grad():
        model = _load("OPTModel", home, mesh, "OPTForCausalLM")
        found["logits/hidden"] = _array(model(ids, mask).last_hidden_state)
        model = _load("OPTForSequenceClassification", home, mesh)
        out = model(ids, mask, labels=np.array([0, 1, 1, 0]))
        found["logits/classes"], found["logits/class loss"] = _array(out.logits), _array(out.loss)
        model = _load("OPTForQuestionAnswering", home, mesh)
        out = model(ids, mask)
        found["logits/start"], found["logits/end"] = (
            _array(out.start_logits),
            _array(out.end_logits),
        )
    return found


def _trainings(config: OPTConfig, home: Path, mesh: Any, names: Any) -> Found:
    still = config.replace(dropout=0.0, attention_dropout=0.0)
    found: Found = {}
    batch = batch_of(config)
    for name in names:
        train = TrainConfig(
            max_steps=3, learning_rate=1e-3, max_grad_norm=0.5, adam_epsilon=1e-6, **TRAININGS[name]
        )
        model = _load("OPTForCausalLM", home, mesh, config=still)
        before = training.evaluate(model, [batch])
        optimizer = training.make_optimizer(model, train)
        model.train()
        given = batch
        if mesh is not None and name == "parts":  # each process has its own rows alone
            rows = sharding.own_rows(batch, mesh, True)
            given = sharding.spread_rows(rows.batch, mesh)
        steps = [training.train_step(model, optimizer, given, train, step) for step in range(3)]
        model.eval()
        after = training.evaluate(model, [batch])
        found[f"losses/{name}"] = np.array([before, *np.ravel(steps), after])
        lora.merge(model)
        for spec in param_specs(config):
            if not spec.name.endswith("k_proj.bias"):
                values = checkpoint.get_parameter(model, spec)
                found[f"weights/{name}/{spec.name}"] = _array(values)
        lora.unmerge(model)
    return found


def _check_reading(model: Any, folder: Path, mesh: Any) -> None:
    """A process reads its own part of each tensor, and of a .bin as of a safetensors file."""
    read: dict[str, tuple[int, ...]] = {}
    cast = checkpoint.cast_tensor

    def watched(name: str, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        read[name] = tuple(values.shape)
        return cast(name, values, dtype)

    checkpoint.cast_tensor = watched
    try:
        pickled = opt_torch.OPTForCausalLM.from_pretrained(folder, mesh=mesh)
    finally:
        checkpoint.cast_tensor = cast
    sizes = sharding.sizes_of(mesh)
    for spec in param_specs(model.config):
        ours, theirs = (distribution.local(checkpoint.locate(m, spec)) for m in (model, pickled))
        assert torch.equal(ours, theirs), spec.name
        assert read[spec.name] == tuple(ours.shape), spec.name
        if spec.name.endswith("fc1.weight"):
            assert ours.numel() * sizes["fsdp"] * sizes["model"] == spec.size


def _check_dropout(home: Path, mesh: Any) -> None:
    """Processes that compute the same rows drop the same; layers are not left out at random."""
    train = TrainConfig(max_steps=1, learning_rate=1e-2, precision="bfloat16")
    model = _load("OPTForCausalLM", home, mesh)
    assert model.config.dropout > 0
    optimizer = training.make_optimizer(model, train)
    model.train()
    loss, norm = training.train_step(model, optimizer, batch_of(model.config), train, 0)
    assert 0 < loss < 100
    assert 0 < norm < 1000
    for spec in param_specs(model.config):
        whole = checkpoint.get_parameter(model, spec)
        found = sharding.team_of(mesh).gather(float(whole.double().sum()))
        assert found == [found[0]] * len(found), spec.name


def parts_of(sizes: list[int], is_first: bool, quick: bool) -> Parts | None:
    """Parts of a configuration that a mesh computes; None: not even a forward pass."""
    if not quick:
        return ALL if is_first or sum(sizes) == 4 else SOME
    # Each part on one mesh; other structures than the first where heads are split.
    if sizes[2] > 1:
        return ("sampled", "assistant", "streamed", "lora") if is_first else ()
    return ("beams", "heads", "parts") if is_first else None


def main(home: Path, out: Path, meshes: list[list[int]], names: list[str], quick: bool) -> None:
    """Computes everything on some meshes.

    Args:
        home: Folder of the models, one for each configuration.
        out: Where to write down what was found.
        meshes: Their sizes.
        names: Configurations.
        quick: Whether the fast tier's share will do.
    """
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    for sizes in meshes:
        mesh = sharding.make_mesh(*sizes)
        for name in names:
            parts = parts_of(sizes, name == names[0], quick)
            if parts is None:
                continue
            found: dict[str, Any] = compute(KINDS[name], home / name, mesh, parts)
            label = "-".join(map(str, sizes))
            np.savez(out / f"{label}-{name}-{rank}.npz", **found)
        model = _load("OPTForCausalLM", home / names[0], mesh)
        model.save_pretrained(out / f"saved-{label}", max_shard_size="100KB")
        _check_reading(model, home / names[0] / "bin", mesh)
        _check_dropout(home / names[0], mesh)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    main(Path(given["home"]), Path(given["out"]), given["meshes"], given["names"], given["quick"])
