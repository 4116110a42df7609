"""Lets the libraries that define the formats compute logits from what we wrote.

    PYTHON tests/support/interop.py jobs.json

Run by `tests/conversion/test_interop.py` with an interpreter that has them. A job is a reader, a
folder, token ids and where to put the logits.
"""

# What is imported here is in the environments that this is made for, not in this project's.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false, reportGeneralTypeIssues=false
import json
import os
import sys
from typing import Any

import numpy as np

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")


def tf(folder: str, ids: np.ndarray) -> Any:
    from transformers import TFOPTForCausalLM

    model, info = TFOPTForCausalLM.from_pretrained(folder, output_loading_info=True)
    check(info)
    return model(ids).logits


def flax(folder: str, ids: np.ndarray) -> Any:
    import jax.numpy as jnp
    from transformers import FlaxOPTForCausalLM

    model = FlaxOPTForCausalLM.from_pretrained(folder)
    return model(jnp.asarray(ids)).logits


def torch(folder: str, ids: np.ndarray) -> Any:
    import torch
    from transformers import OPTForCausalLM

    model, info = OPTForCausalLM.from_pretrained(
        folder, torch_dtype=torch.float32, output_loading_info=True
    )
    check(info)
    with torch.no_grad():
        return model.eval()(torch.tensor(ids).long()).logits


def keras_hub(folder: str, ids: np.ndarray) -> Any:
    import keras
    import keras_hub as hub

    model = hub.models.OPTBackbone.from_preset(folder, dtype="float32")
    hidden = model({"token_ids": ids, "padding_mask": np.ones_like(ids)})
    return keras.ops.convert_to_numpy(model.token_embedding(hidden, reverse=True))


def keras_hub_text(folder: str, ids: np.ndarray) -> Any:
    """The tokenizer too: what a KerasHub preprocessor makes of a text."""
    import keras_hub as hub

    tokenizer = hub.models.OPTTokenizer.from_preset(folder)
    return np.asarray(tokenizer("the dog sleeps"))


def ctranslate2(folder: str, ids: np.ndarray) -> Any:
    import ctranslate2

    converter = ctranslate2.converters.TransformersConverter(folder)
    converter.convert(f"{folder}/ct2", quantization="float32")
    generator = ctranslate2.Generator(f"{folder}/ct2", compute_type="float32")
    batch = ctranslate2.StorageView.from_array(ids)
    lengths = ctranslate2.StorageView.from_array(np.full(len(ids), ids.shape[1], np.int32))
    return np.asarray(generator.forward_batch(batch, lengths))


def check(info: dict[str, Any]) -> None:
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [key for key in info.get(kind) or () if "lm_head" not in key]
        if keys:
            sys.exit(f"{kind}: {keys}")


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        jobs = json.load(file)
    for job in jobs:
        logits = globals()[job["reader"]](job["folder"], np.array(job["ids"], np.int32))
        np.save(job["out"], np.asarray(logits))
