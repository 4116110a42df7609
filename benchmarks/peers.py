"""Times another library on the work of `benchmarks.speed` and prints the same JSON line.

    PYTHON benchmarks/peers.py --system transformers-tf --model DIR --task decode

Runs by itself, in whatever environment holds that library: nothing of this project is imported.

    transformers         transformers 4 or 5, PyTorch
    transformers-tf      transformers 4, TensorFlow, compiled by XLA
    transformers-flax    transformers 4, Flax
    keras-hub-tf         KerasHub on TensorFlow, compiled by XLA, random weights of the same shape
    keras-hub-jax        KerasHub on JAX, likewise
    ctranslate2          CTranslate2; DIR is what its converter wrote
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# The libraries are those of other environments.

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = {"prefill": (1, 512), "decode": (1, 32), "batch": (8, 32), "train": (4, 256)}
Tasks = dict[str, Callable[..., Any]]
"""prefill(), generate(new tokens) and train(); each returns when the numbers are really there."""


def transformers(model: Path, dtype: str, ids: np.ndarray) -> Tasks:
    """Transformers on PyTorch."""
    import torch
    from transformers import OPTForCausalLM

    opt: Any = OPTForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    batch = torch.tensor(ids)
    mask = torch.ones_like(batch)
    optimizer = torch.optim.AdamW(opt.parameters(), lr=1e-4, weight_decay=0.1)

    def prefill() -> float:
        with torch.inference_mode():
            return opt(batch, attention_mask=mask).logits[0, -1, 0].item()

    def generate(new: int) -> None:
        with torch.inference_mode():
            out = opt.generate(
                batch, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        assert out.shape[1] == ids.shape[1] + new

    def train() -> float:
        opt.train()
        loss = opt(batch, attention_mask=mask, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return {"prefill": prefill, "generate": generate, "train": train}


def transformers_tf(model: Path, dtype: str, ids: np.ndarray) -> Tasks:
    """Transformers 4 on TensorFlow, everything compiled by XLA."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    import tensorflow as tf
    import tf_keras
    from transformers import TFOPTForCausalLM

    opt = TFOPTForCausalLM.from_pretrained(model, from_pt=(model / "pytorch_model.bin").exists())
    batch = tf.constant(ids, tf.int32)
    mask = tf.ones_like(batch)
    optimizer = tf_keras.optimizers.AdamW(1e-4, weight_decay=0.1)
    programs: dict[int, Any] = {}

    @tf.function(jit_compile=True)
    def forward(batch: Any) -> Any:
        return opt(batch, attention_mask=mask).logits

    @tf.function(jit_compile=True)
    def step(batch: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = opt(batch, attention_mask=mask, training=True).logits[:, :-1]
            losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch[:, 1:], logits)
            loss = tf.reduce_mean(losses)
        weights = opt.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, weights), weights, strict=True))
        return loss

    def generate(new: int) -> None:
        if new not in programs:
            settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
            programs[new] = tf.function(
                lambda ids: opt.generate(ids, attention_mask=mask, **settings), jit_compile=True
            )
        assert programs[new](batch).numpy().shape[1] == ids.shape[1] + new

    return {
        "prefill": lambda: float(forward(batch)[0, -1, 0]),
        "generate": generate,
        "train": lambda: float(step(batch)),
    }


def transformers_flax(model: Path, dtype: str, ids: np.ndarray) -> Tasks:
    """Transformers 4 on Flax."""
    import jax
    import jax.numpy as jnp
    import optax
    from transformers import FlaxOPTForCausalLM

    opt = FlaxOPTForCausalLM.from_pretrained(model, from_pt=True, dtype=getattr(jnp, dtype))
    opt.config.eos_token_id = opt.generation_config.eos_token_id = opt.config.vocab_size - 1
    batch = jnp.asarray(ids, jnp.int32)
    mask = jnp.ones_like(batch)
    optimizer = optax.adamw(1e-4, weight_decay=0.1)
    forward = jax.jit(lambda params: opt(batch, attention_mask=mask, params=params).logits)
    state: Any = None

    def loss(params: Any, key: Any) -> Any:
        options = {"params": params, "dropout_rng": key, "deterministic": False}
        logits = opt(batch, attention_mask=mask, **options).logits[:, :-1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    @jax.jit
    def step(params: Any, moments: Any, key: Any) -> Any:
        key, own = jax.random.split(key)
        value, gradients = jax.value_and_grad(loss)(params, own)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, key, value

    def generate(new: int) -> None:
        out = opt.generate(batch, attention_mask=mask, max_new_tokens=new, do_sample=False)
        assert out.sequences.block_until_ready().shape[1] == ids.shape[1] + new

    def train() -> float:
        nonlocal state
        state = state or (opt.params, optimizer.init(opt.params), jax.random.key(0))
        *state, value = step(*state)
        return float(value)

    prefill = lambda: float(forward(opt.params)[0, -1, 0])  # noqa: E731
    return {"prefill": prefill, "generate": generate, "train": train}


def keras_hub(model: Path, dtype: str, ids: np.ndarray) -> Tasks:
    """KerasHub on the backend that KERAS_BACKEND names."""
    import keras
    import keras_hub

    config = json.loads((model / "config.json").read_text())
    keras.config.set_dtype_policy(dtype)
    backbone = keras_hub.models.OPTBackbone(
        vocabulary_size=config["vocab_size"], num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], hidden_dim=config["hidden_size"],
        intermediate_dim=config["ffn_dim"], dropout=config["dropout"],
        max_sequence_length=config["max_position_embeddings"],
    )  # fmt: skip
    opt = keras_hub.models.OPTCausalLM(backbone=backbone, preprocessor=None)
    opt.compile(
        sampler="greedy",
        optimizer=keras.optimizers.AdamW(1e-4, weight_decay=0.1),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=True,
    )
    batch = {"token_ids": ids.astype("int32"), "padding_mask": np.ones(ids.shape, "int32")}
    labels = np.roll(batch["token_ids"], -1, 1)

    def generate(new: int) -> None:
        padded = {name: np.pad(values, ((0, 0), (0, new))) for name, values in batch.items()}
        opt.generate(padded, stop_token_ids=None)

    return {
        "prefill": lambda: float(opt.predict(batch, verbose=0)[0, -1, 0]),
        "generate": generate,
        "train": lambda: float(np.ravel(opt.train_on_batch(batch, labels))[0]),
    }


def ctranslate2(model: Path, dtype: str, ids: np.ndarray) -> Tasks:
    """CTranslate2 on the CPU."""
    import ctranslate2 as library

    threads = len(os.sched_getaffinity(0))
    opt = library.Generator(str(model), device="cpu", compute_type=dtype, intra_threads=threads)
    words = json.loads((model / "vocabulary.json").read_text())

    def prompts() -> list[list[str]]:
        return [[words[i] for i in row] for row in ids]

    def prefill() -> float:
        logits = opt.forward_batch(prompts())
        return float(np.array(logits.to(library.DataType.float32))[0, -1, 0])

    def generate(new: int) -> None:
        rows = opt.generate_batch(
            prompts(), max_length=new, min_length=new, beam_size=1, include_prompt_in_result=False
        )
        assert all(len(row.sequences_ids[0]) == new for row in rows)

    def logits(ids: np.ndarray) -> np.ndarray:
        rows = [opt.forward_batch([[words[i] for i in row]]) for row in ids]
        return np.concatenate([np.array(x.to(library.DataType.float32)) for x in rows])

    return {"prefill": prefill, "generate": generate, "logits": logits}


SYSTEMS = {
    "transformers": transformers,
    "transformers-tf": transformers_tf,
    "transformers-flax": transformers_flax,
    "keras-hub-tf": keras_hub,
    "keras-hub-jax": keras_hub,
    "ctranslate2": ctranslate2,
}
KERAS_BACKENDS = {"keras-hub-tf": "tensorflow", "keras-hub-jax": "jax"}


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--system", choices=SYSTEMS, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--task", choices=SHAPES, default="prefill")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--ids", type=Path, help="with --logits: (B, T) ids, a .npy file")
    parser.add_argument("--logits", type=Path, help="write logits to this .npy file, time nothing")
    args = parser.parse_args()
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
    if args.system in KERAS_BACKENDS:
        os.environ["KERAS_BACKEND"] = KERAS_BACKENDS[args.system]
    shape = SHAPES[args.task]
    ids = np.random.default_rng(0).integers(4, 50000, shape)
    ids[:, 0] = 2
    start = time.perf_counter()
    tasks = SYSTEMS[args.system](args.model, args.dtype, ids)
    load_s = time.perf_counter() - start
    if args.logits is not None:
        np.save(args.logits, tasks["logits"](np.load(args.ids)))
        return
    generates = args.task in ("decode", "batch")
    call = (lambda: tasks["generate"](args.new)) if generates else tasks[args.task]
    tokens = shape[0] * (args.new if generates else shape[1])
    seconds = []
    for _ in range(args.reps + 1):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    result = {
        "system": args.system, "model": args.model.resolve().name, "task": args.task,
        "dtype": args.dtype, "load_s": round(load_s, 2), "first_s": round(seconds[0], 2),
        "tok_s": round(tokens / statistics.median(seconds[1:]), 1),
        "best": round(tokens / min(seconds[1:]), 1),
        "rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
