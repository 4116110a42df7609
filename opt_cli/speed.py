"""How fast a backend does one task on this machine: the figures of `opt-lm bench`.

Tasks: prefill (1 x 512), decode (1 x 32, then 64 new tokens), batch (8 x 32, then 64 new tokens
each), lookup (as decode, with prompt lookup, for a text that repeats itself), train (4 x 256,
AdamW), load. Figures: `tok_s` and `best`, tokens per second, median and best
of the repetitions, counting new tokens (decode, batch, lookup) or processed ones (prefill, train);
`first_s`, the first call with everything it has to set up; `load_s`; `rss_gib`, peak resident
memory.
"""

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion.backends import inference, to_numpy
from opt_core import OPTConfig, TrainConfig
from opt_core.adapters.folders import split_adapter
from opt_core.errors import InputError
from opt_core.hub import resolve

SHAPES = {
    "prefill": (1, 512),
    "decode": (1, 32),
    "batch": (8, 32),
    "lookup": (1, 32),
    "train": (4, 256),
    "load": (1, 8),
}
"""Rows and tokens of each task's prompt."""

GENERATING = ("decode", "batch", "lookup")

DRAFT_TOKENS = 10
"""Tokens that prompt lookup drafts at a time."""

PERIOD = 8
"""After so many tokens a text for prompt lookup repeats itself."""


@dataclass(frozen=True)
class Work:
    """A loaded model's tasks; each returns after the numbers are really there.

    Attributes:
        load_s: Seconds that loading took, imports left out.
        prefill: Computes all logits of the prompt.
        generate: Adds so many tokens to the prompt, drafting so many at a time by prompt lookup
            (None: none), and returns all ids.
        train: Takes one optimizer step.
    """

    load_s: float
    prefill: Callable[[], Any]
    generate: Callable[[int, int | None], np.ndarray]
    train: Callable[[], Any]


def torch_work(path: Path, dtype: str, ids: np.ndarray, **options: Any) -> Work:
    """Loads a model into PyTorch."""
    import torch

    from opt_torch import OPTForCausalLM
    from opt_torch.training import make_optimizer, train_step

    start = time.time()
    model = OPTForCausalLM.from_pretrained(path, dtype=dtype, **options)
    load_s = time.time() - start
    batch, mask = torch.tensor(ids), torch.ones(ids.shape, dtype=torch.long)
    config = TrainConfig(lr_schedule="constant")
    optimizer: Any = None

    def prefill() -> float:
        with inference("torch"):
            return model(batch, attention_mask=mask).logits[0, -1, 0].item()

    def generate(new: int, lookup: int | None) -> np.ndarray:
        return to_numpy(model.generate(batch, attention_mask=mask, **greedy(new, lookup)))

    def train() -> float:
        nonlocal optimizer
        optimizer = optimizer or make_optimizer(model.train(), config)
        return train_step(model, optimizer, batch, config, step=0)[0]

    return Work(load_s, prefill, generate, train)


def flax_work(path: Path, dtype: str, ids: np.ndarray, **options: Any) -> Work:
    """Loads a model into Flax."""
    import jax
    from flax import nnx

    from opt_flax import FlaxOPTForCausalLM
    from opt_flax.training import make_optimizer, train_step

    start = time.time()
    model = FlaxOPTForCausalLM.from_pretrained(path, dtype=dtype, **options)
    jax.block_until_ready(nnx.state(model))
    load_s = time.time() - start
    mask = np.ones(ids.shape, np.int32)
    config = TrainConfig(lr_schedule="constant")
    graph, state = nnx.split(model)  # `nnx.jit` would copy the weights at every call
    forward = jax.jit(lambda state, ids: nnx.merge(graph, state)(ids).logits)
    optimizer: Any = None

    def prefill() -> Any:
        return jax.block_until_ready(forward(state, ids))

    def generate(new: int, lookup: int | None) -> np.ndarray:
        return to_numpy(model.generate(ids, attention_mask=mask, **greedy(new, lookup)))

    def train() -> float:
        nonlocal optimizer
        if optimizer is None:
            model.train()
            optimizer = make_optimizer(model, config)
        return train_step(model, optimizer, ids, config, step=0)[0]

    return Work(load_s, prefill, generate, train)


def tf_work(path: Path, dtype: str, ids: np.ndarray, **options: Any) -> Work:
    """Loads a model into TensorFlow."""
    import tensorflow as tf

    from opt_tf import TFOPTForCausalLM
    from opt_tf.training import make_optimizer, train_step

    start = time.time()
    model = TFOPTForCausalLM.from_pretrained(path, dtype=dtype, **options)
    load_s = time.time() - start
    batch, mask = tf.constant(ids, tf.int32), tf.ones(ids.shape, tf.int32)
    config = TrainConfig(lr_schedule="constant")
    forward = tf.function(lambda ids: model(ids).logits, jit_compile=True)
    optimizer: Any = None

    def prefill() -> float:
        return float(forward(batch)[0, -1, 0])

    def generate(new: int, lookup: int | None) -> np.ndarray:
        return to_numpy(model.generate(batch, attention_mask=mask, **greedy(new, lookup)))

    def train() -> float:
        nonlocal optimizer
        optimizer = optimizer or make_optimizer(model, config)
        return train_step(model, optimizer, batch, config, step=0)[0]

    return Work(load_s, prefill, generate, train)


BACKENDS = {"torch": torch_work, "tf": tf_work, "flax": flax_work}


def prompt(task: str, config: OPTConfig, new: int) -> np.ndarray:
    """Random ids for a task: as many as its shape says, or as the model has room for."""
    rows, length = SHAPES[task]
    room = config.max_position_embeddings - (new if task in GENERATING else 0)
    if room < 1:
        raise InputError(
            f"new tokens: expected less than {config.max_position_embeddings}, received {new}"
        )
    shape = (rows, min(length, room))
    ids = np.random.default_rng(0).integers(4, min(50000, config.vocab_size), shape)
    if task == "lookup":
        ids = np.resize(ids[:, :PERIOD], shape)
    ids[:, 0] = 2
    return ids


def greedy(new: int, lookup: int | None) -> dict[str, Any]:
    """Settings of generation: exactly so many new tokens, whatever the model's own file says."""
    return {
        "max_new_tokens": new, "eos_token_id": None, "do_sample": False,
        "prompt_lookup_num_tokens": lookup,
    }  # fmt: skip


def measure(
    backend: str,
    model: str | Path,
    task: str,
    dtype: str = "float32",
    quantize: str | None = None,
    reps: int = 3,
    new: int = 64,
    mesh: Any = None,
) -> dict[str, Any]:
    """Times one task in this process.

    Args:
        backend: "torch", "tf" or "flax".
        model: Folder, hub id, or "mini".
        task: One of `SHAPES`.
        dtype: Of the weights.
        quantize: "int8", "int4", or None.
        reps: Timed repetitions; one more goes before them.
        new: Tokens to add in the tasks that generate.
        mesh: The backend's mesh to spread the model over; None: one device.

    Returns:
        The fields that the module's docstring names.
    """
    path = resolve(model)
    ids = prompt(task, OPTConfig.from_pretrained(split_adapter(path)[0]), new)
    options = {} if mesh is None else {"mesh": mesh}
    work = BACKENDS[backend](path, dtype, ids, quantize=quantize, **options)
    result: dict[str, Any] = {
        "system": f"opt-lm-{backend}", "model": path.resolve().name, "task": task,
        "dtype": dtype, "quantize": quantize, "load_s": round(work.load_s, 2),
    }  # fmt: skip
    if task != "load":
        lookup = DRAFT_TOKENS if task == "lookup" else None
        generates = task in GENERATING
        call = (lambda: work.generate(new, lookup)) if generates else getattr(work, task)
        tokens = ids.shape[0] * new if generates else ids.size
        seconds = [timed(call) for _ in range(reps + 1)]
        if lookup and not np.array_equal(work.generate(new, None), call()):
            raise RuntimeError("drafts changed the text")
        result["first_s"] = round(seconds[0], 2)
        result["tok_s"] = round(tokens / statistics.median(seconds[1:]), 1)
        result["best"] = round(tokens / min(seconds[1:]), 1)
    result["rss_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return result


def timed(call: Callable[[], Any]) -> float:
    """Seconds one call takes."""
    start = time.time()
    call()
    return time.time() - start
