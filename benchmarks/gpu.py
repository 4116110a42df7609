"""Takes every figure that wants a GPU: `make gpu`.

    python -m benchmarks.gpu [--seconds 540] [--only NAME ...] [--device cuda] [--tiny]

Each job is a process of its own, and what it finds is written at once to
`benchmarks/results/gpu-<card>.json`; a second run does what is missing. Jobs: the tests marked gpu;
float32 logits of the card beside the CPU's with TF32 off, and bfloat16 ones; what the card can do
(read, multiply); and for opt-125m, opt-1.3b and opt-6.7b in bfloat16, with weights drawn on the
card: decoding 1, 8 and 64 rows, int8 and int4 too, a prefill of 8 x 2048 by each attention, a step
of training, and `transformers` with a static cache, which it compiles. `--tiny` and `--device cpu`
try the plumbing where there is no GPU; their figures mean nothing.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.limits import best
from opt_core import OPTConfig, TrainConfig
from opt_core.params import param_specs
from opt_core.quantization import quantize_array, scheme_of

RESULTS = Path(__file__).parent / "results"
SIZES = ("opt-125m", "opt-1.3b", "opt-6.7b")
BATCHES = (1, 8, 64)
PROMPT, NEW, TRIES = 64, 64, 3
PREFILL = (8, 2048)
TRAINED = "opt-1.3b"
TINY: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 64, "num_hidden_layers": 2, "ffn_dim": 128,
    "num_attention_heads": 4, "word_embed_proj_dim": 64,
}  # fmt: skip
PARITY = 2e-5
"""Largest difference of float32 logits, card to CPU."""


def jobs() -> dict[str, tuple[Callable[..., dict[str, Any]], tuple[Any, ...]]]:
    """Every job by name: its function and arguments, the cheapest first."""
    found: dict[str, Any] = {"limits": (limits, ()), "tests": (tests, ()), "parity": (parity, ())}
    for size in SIZES:
        for batch in BATCHES:
            for how in (None, "int8", "int4"):
                found[f"{size} decode {batch} {how or 'bfloat16'}"] = (decode, (size, batch, how))
            found[f"{size} decode {batch} transformers"] = (decode_peer, (size, batch))
        for how in ("sdpa", "flash_attention_2", "eager"):
            found[f"{size} prefill {how}"] = (prefill, (size, how))
    found[f"{TRAINED} train"] = (train, (TRAINED,))
    return found


def make_config(size: str, is_tiny: bool) -> OPTConfig:
    """The configuration of a size, or a tiny one in its place."""
    config = OPTConfig.from_preset(size)
    return config.replace(**TINY) if is_tiny else config


def make_model(size: str, device: str, is_tiny: bool, attention: str = "sdpa") -> Any:
    """A model in bfloat16 with weights drawn on the device."""
    import torch

    from opt_torch import OPTForCausalLM, checkpoint

    model = OPTForCausalLM(make_config(size, is_tiny), None, attention)
    model.to(torch.bfloat16).to_empty(device=device)
    checkpoint.tie(model)
    with torch.no_grad():
        for name, values in model.named_parameters():
            values.fill_(1) if "norm.weight" in name else values.normal_(0, 0.02)
    return model.eval()


def quantize_model(model: Any, scheme: str) -> None:
    """Gives a model quantised weights; all of one shape have the same numbers."""
    import torch

    from opt_torch import checkpoint, quantization

    rng, drawn = np.random.default_rng(0), {}
    device = model.get_decoder().embed_tokens.weight.device
    for spec in param_specs(model.config, model.head):
        how = scheme_of(spec, scheme)
        if how is None:
            continue
        if (how, spec.shape) not in drawn:
            values = rng.normal(0, 0.02, spec.shape).astype(np.float32)
            drawn[how, spec.shape] = quantize_array(spec.name, values, how)
        numbers = drawn[how, spec.shape]
        quantization.set_quantized(model, spec, numbers, torch.bfloat16, device)
    checkpoint.tie(model)
    model.requires_grad_(False)


def seconds(call: Callable[[], Any], device: str, tries: int = TRIES) -> float:
    """Of the fastest of several calls, work on the device included."""
    import torch

    def run() -> None:
        call()
        if device != "cpu":
            torch.accelerator.synchronize()

    return best(run, tries)


def peak_gib(device: str) -> float | None:
    """Most memory that PyTorch held on the card; None where there is none."""
    import torch

    return round(torch.cuda.max_memory_allocated() / 2**30, 2) if device == "cuda" else None


def limits(device: str, is_tiny: bool) -> dict[str, Any]:
    """Bytes that the card reads, and operations it does, in a second."""
    import torch

    size = 256 if is_tiny else 8192
    block = torch.zeros(size**2 * 8, device=device)
    a, b = (torch.randn(size, size, device=device).to(torch.bfloat16) for _ in range(2))
    read = block.nbytes / seconds(block.sum, device, 7)
    rate = 2 * size**3 / seconds(lambda: a @ b, device, 7)
    return {"read_gb_s": read / 1e9, "bfloat16_tflop_s": rate / 1e12}


def tests(device: str, is_tiny: bool) -> dict[str, Any]:
    """The tests marked gpu."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-m", "gpu", "tests/torch"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"exit": done.returncode, "said": done.stdout.strip().splitlines()[-1][:200]}


def parity(device: str, is_tiny: bool) -> dict[str, Any]:
    """Largest differences of the embedded model's logits: float32 and bfloat16, card to CPU."""
    import torch

    from opt_torch import OPTForCausalLM

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    ids = torch.arange(3, 99).reshape(2, 48)

    def logits(dtype: str, where: str) -> Any:
        model = OPTForCausalLM.from_pretrained("mini", dtype=dtype).to(where)
        with torch.no_grad():
            return model(ids.to(where)).logits.float().cpu()

    exact = logits("float32", "cpu")
    found = {d: float((logits(d, device) - exact).abs().max()) for d in ("float32", "bfloat16")}
    return {**found, "is_within": found["float32"] <= PARITY}


def rates(generate: Callable[[int], Any], batch: int, device: str) -> dict[str, Any]:
    """Tokens per second behind the first, whose time, the prompt's included, is told too."""
    first = seconds(lambda: generate(1), device)
    rest = seconds(lambda: generate(NEW), device) - first
    return {
        "tok_s": batch * (NEW - 1) / max(rest, 1e-9),
        "first_s": first,
        "peak_gib": peak_gib(device),
    }


def make_ids(batch: int, length: int, vocabulary: int, device: str) -> Any:
    """Prompts (batch, length)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(4, vocabulary, (batch, length), generator=generator).to(device)


def decode(
    device: str, is_tiny: bool, size: str, batch: int, quantize: str | None
) -> dict[str, Any]:
    """Greedy decoding of ours."""
    model = make_model(size, device, is_tiny)
    if quantize is not None:
        quantize_model(model, quantize)
    ids = make_ids(batch, PROMPT, model.config.vocab_size, device)
    return rates(
        lambda new: model.generate(ids, max_new_tokens=new, min_new_tokens=new), batch, device
    )


def decode_peer(device: str, is_tiny: bool, size: str, batch: int) -> dict[str, Any]:
    """Greedy decoding of `transformers`, its static cache compiled."""
    import torch
    from transformers import OPTConfig as PeerConfig
    from transformers import OPTForCausalLM as Peer

    config = make_config(size, is_tiny)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = Peer(PeerConfig(**config.to_dict())).eval()
    torch.set_default_dtype(torch.float32)
    ids = make_ids(batch, PROMPT, config.vocab_size, device)
    given = {"attention_mask": torch.ones_like(ids), "do_sample": False}
    given["cache_implementation"] = "static"

    def generate(new: int) -> Any:
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **given)

    return rates(generate, batch, device)


def prefill(device: str, is_tiny: bool, size: str, attention: str) -> dict[str, Any]:
    """Prompts of 2048 tokens to the first token of each."""
    rows, length = (2, 32) if is_tiny else PREFILL
    model = make_model(size, device, is_tiny, attention)
    ids = make_ids(rows, length - 1, model.config.vocab_size, device)
    taken = seconds(lambda: model.generate(ids, max_new_tokens=1), device)
    return {"tok_s": rows * (length - 1) / taken, "peak_gib": peak_gib(device)}


def train(device: str, is_tiny: bool, size: str) -> dict[str, Any]:
    """Steps of AdamW on texts of 2048 tokens."""
    from opt_torch import training

    rows, length = (2, 32) if is_tiny else (4, 2048)
    model, config = make_model(size, device, is_tiny), TrainConfig(max_steps=10)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = training.make_optimizer(model, config)
    ids = make_ids(rows, length, model.config.vocab_size, device)
    taken = seconds(lambda: training.train_step(model, optimizer, ids, config, 0), device)
    return {"tok_s": rows * length / taken, "peak_gib": peak_gib(device)}


def card_name(device: str) -> str | None:
    """The name that results get; None: there is no such device."""
    import torch

    if device != "cuda":
        return device
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def run_job(name: str, arguments: argparse.Namespace, left: float) -> dict[str, Any]:
    """One job in a process of its own: what it found, or why it found nothing."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--job", name, "--device", arguments.device]
    try:
        done = subprocess.run(
            command + ["--tiny"] * arguments.tiny,
            capture_output=True, text=True, check=False, timeout=left,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=540, help="start no job after these")
    parser.add_argument("--only", nargs="+", help="jobs whose names begin so")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models in place of the sizes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        function, given = jobs()[arguments.job]
        print(json.dumps(function(arguments.device, arguments.tiny, *given)))
        return
    card = card_name(arguments.device)
    if card is None:
        print("make gpu: no CUDA device was found; nothing was measured")
        return
    path = arguments.results / f"gpu-{re.sub(r'[^a-z0-9]+', '-', card.lower()).strip('-')}.json"
    found = json.loads(path.read_text()) if path.exists() else {"card": card, "jobs": {}}
    end = time.monotonic() + arguments.seconds
    waiting = [
        name for name in jobs()
        if name.startswith(tuple(arguments.only or ("",)))
        and "error" in found["jobs"].get(name, {"error": ""})
    ]  # fmt: skip
    while waiting and (left := end - time.monotonic()) > 0:
        name = waiting.pop(0)
        found["jobs"][name] = run_job(name, arguments, left)
        print(name, json.dumps(found["jobs"][name]), flush=True)
        path.write_text(json.dumps(found, indent=1) + "\n")
    if waiting:
        print(f"{len(waiting)} jobs are left: run it again")


if __name__ == "__main__":
    main()
