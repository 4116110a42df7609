"""Records checkpoints with the libraries that define their formats.

    PYTHON tests/support/files/record_checkpoints.py tests/conversion/recorded

PYTHON is an interpreter with transformers 4.57 and TensorFlow, Flax and torch; or one with
keras-hub. Each makes what it can. Every folder holds one checkpoint, and in `expected.npz` the
token ids and the logits that the library itself computes from it.
"""

# What is imported here is in the environments that this is made for, not in this project's.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false, reportGeneralTypeIssues=false
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")

TINY: dict[str, Any] = {
    "vocab_size": 21,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "ffn_dim": 12,
    "max_position_embeddings": 10,
    "dropout": 0.0,
}
PRE_LN = {**TINY, "word_embed_proj_dim": 8}
POST_LN = {**TINY, "word_embed_proj_dim": 6, "do_layer_norm_before": False}
IDS = np.array([[2, 5, 9, 20, 3, 7]], np.int32)


def values(shape: Any, rng: np.random.Generator) -> np.ndarray:
    return rng.normal(0, 0.5, tuple(shape)).astype(np.float32)


def record(folder: Path, logits: Any) -> None:
    np.savez(folder / "expected.npz", ids=IDS, logits=np.asarray(logits, np.float32))


def tensorflow(out: Path) -> None:
    import tensorflow as tf
    from transformers import OPTConfig, TFOPTForCausalLM

    for name, fields, shard in (
        ("tf_pre_ln", PRE_LN, "5GB"),
        ("tf_post_ln_sharded", POST_LN, "2KB"),
        ("tf_post_ln_safetensors", POST_LN, "5GB"),
    ):
        model = TFOPTForCausalLM(OPTConfig(**fields))
        model(tf.constant(IDS))
        rng = np.random.default_rng(1)
        for weight in model.weights:
            weight.assign(values(weight.shape, rng))
        safe = name.endswith("safetensors")
        model.save_pretrained(out / name, max_shard_size=shard, safe_serialization=safe)
        record(out / name, model(tf.constant(IDS)).logits)


def flax(out: Path) -> None:
    import jax
    import jax.numpy as jnp
    from transformers import FlaxOPTForCausalLM, OPTConfig

    for name, fields, shard, dtype in (
        ("flax_post_ln", POST_LN, "5GB", jnp.float32),
        ("flax_pre_ln_bfloat16_sharded", PRE_LN, "1KB", jnp.bfloat16),
        ("flax_post_ln_safetensors", POST_LN, "5GB", jnp.float32),
    ):
        model = FlaxOPTForCausalLM(OPTConfig(**fields), seed=0)
        rng = np.random.default_rng(2)
        leaves, tree = jax.tree.flatten(model.params)
        leaves = [jnp.asarray(values(leaf.shape, rng)).astype(dtype) for leaf in leaves]
        model.params = jax.tree.unflatten(tree, leaves)
        safe = name.endswith("safetensors")
        model.save_pretrained(out / name, max_shard_size=shard, safe_serialization=safe)
        model.params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
        record(out / name, model(jnp.asarray(IDS)).logits)


def torch(out: Path) -> None:
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(3)
    model = OPTForCausalLM(OPTConfig(**POST_LN)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn_like(weight) / 2)
    model.half().save_pretrained(out / "torch_post_ln_float16", safe_serialization=False)
    with torch.no_grad():
        record(out / "torch_post_ln_float16", model.float()(torch.tensor(IDS).long()).logits)


def keras_hub(out: Path) -> None:
    import keras
    import keras_hub as hub

    for dtype, shard in (("float32", 10), ("bfloat16", 10), ("float32", 3e-6)):
        folder = out / f"keras_hub_{dtype if shard == 10 else 'sharded'}"
        backbone = hub.models.OPTBackbone(
            vocabulary_size=TINY["vocab_size"],
            num_layers=TINY["num_hidden_layers"],
            num_heads=TINY["num_attention_heads"],
            hidden_dim=TINY["hidden_size"],
            intermediate_dim=TINY["ffn_dim"],
            dropout=0.0,
            max_sequence_length=TINY["max_position_embeddings"],
            dtype=dtype,
        )
        rng = np.random.default_rng(4)
        for weight in backbone.weights:
            weight.assign(values(weight.shape, rng))
        backbone.save_to_preset(str(folder), max_shard_size=shard)
        check = hub.models.OPTBackbone.from_preset(str(folder), dtype="float32")
        hidden = check({"token_ids": IDS, "padding_mask": np.ones_like(IDS)})
        record(folder, keras.ops.convert_to_numpy(check.token_embedding(hidden, reverse=True)))
        if folder.name.endswith("float32"):
            (folder / "model.weights.h5").unlink()  # a task has the backbone among its layers
            model = hub.models.OPTCausalLM(backbone=backbone, preprocessor=None)
            model.save_weights(str(folder / "task.weights.h5"))


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("keras_hub"):
        keras_hub(out)
    else:
        for make in (tensorflow, flax, torch):
            make(out)
    for path in out.rglob("config.json"):  # whose library version changes with every release
        values = json.loads(path.read_text())
        values.pop("transformers_version", None)
        path.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
