"""Checkpoints as metaseq saved them: cut by model parallelism, flattened and cut again by FSDP.

Written from metaseq's layout, with torch, and sharing nothing with the reader.
"""

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opt_core.config import OPTConfig
from tests.support.files.checkpoint_fixtures import TINY, Weights

# Divisible by 2 and 4, as the real shapes are by their parts.
EVEN = TINY.replace(vocab_size=24, num_attention_heads=4, max_position_embeddings=11)
COLUMNS = ("out_proj.weight", "fc2.weight")
ROWS = (
    *("embed_tokens.weight", "output_projection.weight", "fc1.weight", "fc1.bias"),
    *("qkv_proj.weight", "qkv_proj.bias"),
)


def fake(module: str, name: str, **attributes: Any) -> Any:
    """An object of a class whose module the reader does not have."""
    for i in range(module.count(".") + 1):
        parent = ".".join(module.split(".")[: i + 1])
        sys.modules.setdefault(parent, types.ModuleType(parent))
    if not hasattr(sys.modules[module], name):
        setattr(sys.modules[module], name, type(name, (), {"__module__": module}))
    kind = getattr(sys.modules[module], name)
    made = kind()
    made.__dict__.update(attributes)
    return made


def forget() -> None:
    faked = ("metaseq", "omegaconf", "deepspeed", "lightning_module", "evil")
    for name in [n for n in sys.modules if n.partition(".")[0] in faked]:
        del sys.modules[name]


def omegaconf(values: dict[str, Any]) -> Any:
    """As OmegaConf pickles a config: a node around each value."""
    content = {
        key: omegaconf(value)
        if isinstance(value, dict)
        else fake("omegaconf.nodes", "AnyNode", _val=value, _parent=None, _metadata=None)
        for key, value in values.items()
    }
    return fake("omegaconf.dictconfig", "DictConfig", _content=content, _parent=None)


def rename(name: str) -> str:
    name = name.removeprefix("model.")
    for ours, theirs in (
        ("decoder.final_layer_norm.", "decoder.layer_norm."),
        ("decoder.project_in.", "decoder.project_in_dim."),
        ("decoder.project_out.", "decoder.project_out_dim."),
        ("lm_head.", "decoder.output_projection."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def model_parts(weights: Weights, parts: int) -> list[dict[str, torch.Tensor]]:
    """Megatron's split: rows of fc1, q, k, v and the embedding, columns of fc2 and out_proj."""
    made: list[dict[str, torch.Tensor]] = []
    for part in range(parts):
        state: dict[str, torch.Tensor] = {"decoder.version": torch.tensor([3.0])}
        for name, array in weights.items():
            tensor = torch.from_numpy(array)
            if ".q_proj." in name or ".v_proj." in name:
                continue
            if ".k_proj." in name:
                three = [
                    torch.from_numpy(weights[name.replace("k_proj", f"{c}_proj")]) for c in "kvq"
                ]
                tensor = torch.cat([t.chunk(parts)[part] for t in three])
                name = name.replace("k_proj", "qkv_proj")
            elif rename(name).endswith(ROWS):
                tensor = tensor.chunk(parts)[part]
            elif name.endswith(COLUMNS):
                tensor = tensor.chunk(parts, dim=1)[part]
            state[rename(name)] = tensor.clone()
        made.append(state)
    return made


def fsdp_shards(state: dict[str, torch.Tensor], count: int) -> list[dict[str, Any]]:
    """Each layer, and the rest, flattened into one parameter and cut into equal shards."""
    version = state.pop("decoder.version")
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        parts = name.split(".")
        path = ".".join(parts[:3]) if parts[1] == "layers" else ""
        groups.setdefault(path, {})[name.removeprefix(f"{path}.")] = tensor
    shards: list[dict[str, Any]] = [
        {"model": {"decoder.version": version}, "param_metadata": []} for _ in range(count)
    ]
    for path, members in groups.items():
        flat = torch.cat([t.reshape(-1) for t in members.values()])
        chunks = list(flat.chunk(count))
        key = f"{path}.flat_param_0" if path else "flat_param_0"
        for shard, chunk in zip(shards, chunks, strict=True):
            padding = chunks[0].numel() - chunk.numel()
            shard["model"][key] = torch.nn.functional.pad(chunk, (0, padding)).clone()
            info = {
                "names": list(members) if not path else [f"_fpw_module.{n}" for n in members],
                "shapes": [t.shape for t in members.values()],
                "numels": [t.numel() for t in members.values()],
                "padding": padding,
            }
            shard["param_metadata"].append(
                {
                    "fsdp_path": path,
                    "params": {"flat_param_0": info},
                    "no_broadcast_optim_state": False,
                    "shared_param_info": [],
                }
            )
    return shards


def save(path: Path, config: OPTConfig, content: dict[str, Any]) -> None:
    settings = {
        "decoder_attention_heads": config.num_attention_heads,
        "decoder_normalize_before": config.do_layer_norm_before,
        "activation_fn": config.activation_function,
    }
    iterator = fake("metaseq.data.iterators", "CountingIterator", n=3, epoch={(1, 2): b"x"})
    others = {
        "cfg": omegaconf({"model": settings, "common": {"seed": 1}}),
        "args": None,
        "extra_state": {"train_iterator": iterator, "metrics": [("loss", np.float64(1.5))]},
        "optimizer_history": [{"criterion_name": "CrossEntropyCriterion", "num_updates": 7}],
    }
    torch.save({**others, **content}, path)
    forget()


def write_metaseq(
    folder: Path, config: OPTConfig, weights: Weights, parts: int, shards: int
) -> Path:
    """reshard.pt, reshard-model_part-N.pt, or checkpoint_last-model_part-N-shardM.pt."""
    folder.mkdir(exist_ok=True)
    for i, state in enumerate(model_parts(weights, parts)):
        name = f"-model_part-{i}" if parts > 1 else ""
        if shards == 1:
            save(folder / f"reshard{name}.pt", config, {"model": state})
            continue
        for j, shard in enumerate(fsdp_shards(state, shards)):
            metadata = {"param_metadata": shard["param_metadata"], "buffer_names": []}
            content = {"model": shard["model"], "shard_metadata": metadata}
            save(folder / f"checkpoint_last{name}-shard{j}.pt", config, content)
    return folder
