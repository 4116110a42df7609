"""Compiles the programs of every official size for TPU slices, on a machine that has no TPU.

    python -m benchmarks.tpu_compile                               # the whole table
    python -m benchmarks.tpu_compile --size opt-175b --chip v5p
    python -m benchmarks.tpu_compile --saved --markdown            # what was measured before

The compiler (`pip install libtpu`) is the one that runs where TPUs are, the programs are those that
`generate`, `stream` and `train_step` run, and it refuses what does not fit: every figure is the
compiler's, none is measured on a chip. Weights have no values, so any machine will do. What was
found goes to benchmarks/results/tpu.json.

Generation is for 8 rows of 2048 slots, training for 2048 tokens a row, with gradient checkpointing
and stacked layers; weights and AdamW's moments are bfloat16.
"""

import argparse
import json
import math
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

# Before jax is imported: it must not look for chips, nor may two compilers lock each other out.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

from opt_core import GenerationConfig, OPTConfig, TrainConfig
from opt_core.generation.request import Request
from opt_flax import FlaxOPTForCausalLM, attention, checkpoint, sharding, training
from opt_flax.compilation import Prompts, _read_prompts
from opt_flax.generation import loop
from opt_flax.generation.sampling import request_rules

RESULTS = Path(__file__).parent / "results" / "tpu.json"
PROGRAMS = ("prefill", "decode step", "decode loop", "training step")
COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
ROWS, LENGTH = 8, 2048
GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """One kind of TPU.

    Attributes:
        memory: GiB of a chip.
        flops: bfloat16 operations per second of a chip.
        slices: Chips in a slice -> the slice's shape.
    """

    memory: int
    flops: float
    slices: dict[int, str]


_FLAT = {
    1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"
}  # fmt: skip
_CUBES = {
    1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8"
}  # fmt: skip
CHIPS = {
    "v5e": Chip(16, 197e12, _FLAT),
    "v5p": Chip(95, 459e12, _CUBES),
    "v6e": Chip(32, 918e12, _FLAT),
}
"""Sources: Google's system architecture pages of each chip."""

MESHES = {
    "opt-125m": {"v5e": "1x1x1 1x1x1", "v5p": "1x1x1 1x1x1", "v6e": "1x1x1 1x1x1"},
    "opt-350m": {"v5e": "1x1x1 1x1x1", "v5p": "1x1x1 1x1x1", "v6e": "1x1x1 1x1x1"},
    "opt-1.3b": {"v5e": "1x1x1 1x4x1", "v5p": "1x1x1 1x1x1", "v6e": "1x1x1 1x4x1"},
    "opt-2.7b": {"v5e": "1x1x4 1x4x1", "v5p": "1x1x1 1x1x1", "v6e": "1x1x1 1x4x1"},
    "opt-6.7b": {"v5e": "1x1x4 1x8x1", "v5p": "1x1x1 1x4x1", "v6e": "1x1x4 1x4x1"},
    "opt-13b": {"v5e": "1x1x4 1x16x1", "v5p": "1x1x1 1x4x1", "v6e": "1x1x4 1x8x1"},
    "opt-30b": {"v5e": "1x1x8 1x4x8", "v5p": "1x1x4 1x4x1", "v6e": "1x1x4 1x4x4"},
    "opt-66b": {"v5e": "1x2x8 1x8x8", "v5p": "1x1x4 1x2x4", "v6e": "1x1x8 1x8x4"},
    "opt-175b": {"v5e": "1x1x32 1x16x8", "v5p": "1x1x8 1x4x8", "v6e": "1x1x16 1x8x8"},
}
"""Size -> chip -> data x fsdp x model for generation and for training."""


@dataclass
class Row:
    """One program, compiled.

    Attributes:
        size: Name of the model.
        chip: Kind of TPU.
        chips: How many.
        mesh: "data x fsdp x model".
        program: One of `PROGRAMS`.
        batch: Rows of the batch.
        arguments: Bytes per chip: weights, cache, optimizer state.
        temporaries: Bytes per chip besides, results and code included.
        peak: Most bytes per chip in use at once, its fast memory (0.1 GiB) included.
        memory: Bytes a chip has.
        seconds: The compiler's estimate of a run; None where it has none.
        collectives: Kind -> instructions in the program; a loop's body counts once.
        largest_gather: Bytes of the largest array gathered from other chips.
        compile_s: Time it took to compile.
        error: What the compiler said if it refused.
    """

    size: str
    chip: str
    chips: int
    mesh: str
    program: str
    batch: int
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    memory: int = 0
    seconds: float | None = None
    collectives: dict[str, int] = field(default_factory=dict)
    largest_gather: int = 0
    compile_s: float = 0.0
    error: str | None = None


def make_mesh(chip: str, sizes: tuple[int, ...]) -> Mesh:
    """A mesh over the smallest slice of so many chips."""
    shape = CHIPS[chip].slices[math.prod(sizes)]
    options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    described = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{chip}:{shape}", **options
    )
    return sharding.make_mesh(*sizes, devices=described.devices)


def make_model(config: OPTConfig, mesh: Mesh, scan_layers: bool) -> FlaxOPTForCausalLM:
    """A model in bfloat16 whose weights have places on the chips, and no values."""
    model = FlaxOPTForCausalLM(config, None, "flash_attention_2", scan_layers, mesh)
    checkpoint.init_abstract(model, jnp.dtype(jnp.bfloat16))
    return model


def abstract_arguments(tree: Any, mesh: Mesh, shardings: Any = None) -> Any:
    """Shapes, types and places of what a program takes; what has no place yet is on every chip."""

    def one(value: Any, sharding: Any) -> Any:
        if isinstance(value, jax.ShapeDtypeStruct) and value.sharding is not None:
            return value
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    if shardings is None:
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
    return jax.tree.map(one, tree, shardings)


def lower_generation(config: OPTConfig, mesh: Mesh) -> Iterator[tuple[str, Any]]:
    """The programs of `generate` and `stream`: yields each one's name and a function that compiles.

    The cache that decoding takes lies as prefill leaves it.
    """
    model = make_model(config, mesh, scan_layers=False)
    graph, state = nnx.split(model)
    state = abstract_arguments(state, mesh)
    new = GenerationConfig(max_new_tokens=2, eos_token_id=2)
    V = config.vocab_size
    request = Request(np.zeros((ROWS, LENGTH - 2), np.int32), None, new, 2, V, V, 1)
    rules = request_rules(model, request, jax.eval_shape(lambda: jax.random.key(0)))
    rules = abstract_arguments(rules, mesh)
    ids = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
    mask = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.bool_)
    prompts = Prompts(ids, None, np.int32(LENGTH - 1), None)
    read = _read_prompts.lower(graph, state, prompts, None, LENGTH)
    compiled = read.compile()
    yield "prefill", compiled
    found = abstract_arguments(read.out_info, mesh, compiled.output_shardings)
    begin = loop._open.lower(*found, ids, mask, prompts.length, rules, mesh)
    rows = abstract_arguments(begin.out_info[0], mesh, begin.compile().output_shardings[0])
    yield "decode step", loop._step.lower(graph, state, rows, rules).compile()
    yield "decode loop", loop._loop.lower(graph, state, rows, rules).compile()


def lower_training(config: OPTConfig, mesh: Mesh, rows: int) -> Iterator[tuple[str, Any]]:
    """The program of `train_step`: AdamW, dropout as configured, layers computed again."""
    model = make_model(config, mesh, scan_layers=True)
    model.train()
    model.gradient_checkpointing_enable()
    optimizer = nnx.eval_shape(lambda: training.make_optimizer(model, TrainConfig()))
    graph, state = nnx.split((model, optimizer))
    places = {path: leaf.get_value().sharding for path, leaf in _parameters(model)}

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        # AdamW's moments lie as their parameters do; their paths end alike.
        value = leaf.get_value()
        sharding = next((places[path[i:]] for i in range(len(path)) if path[i:] in places), None)
        if sharding is None or value.ndim == 0:
            return leaf
        return leaf.replace(jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding))

    state = abstract_arguments(nnx.map_state(place, state), mesh)
    where = NamedSharding(mesh, PartitionSpec(sharding.rows_axes(rows, mesh)))
    ids = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32, sharding=where)
    inputs = {"input_ids": ids, "labels": ids}
    step = training._step.lower(graph, state, inputs, np.uint32(0), np.float32(1e-4), (0.0, False))
    yield "training step", step.compile()


def _parameters(model: FlaxOPTForCausalLM) -> Any:
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def measure(size: str, chip: str, wanted: tuple[str, ...]) -> Iterator[Row]:
    """Compiles a model's programs for one kind of TPU."""
    config = OPTConfig.from_preset(size)
    generating, learning = (
        tuple(int(n) for n in sizes.split("x")) for sizes in MESHES[size][chip].split()
    )
    rows = max(ROWS, math.prod(learning[:2]))
    work = (
        (PROGRAMS[:3], generating, ROWS, partial(lower_generation, config)),
        (PROGRAMS[3:], learning, rows, partial(lower_training, config, rows=rows)),
    )
    for names, sizes, batch, lower in work:
        if not set(names) & set(wanted):
            continue
        mesh, start = make_mesh(chip, sizes), time.time()
        row = partial(Row, size, chip, mesh.size, " x ".join(map(str, sizes)), batch=batch)
        made = lower(mesh)
        for name in names:
            try:
                found = describe(next(made)[1], row(program=name), chip)
            except jax.errors.JaxRuntimeError as error:
                found = row(program=name, memory=CHIPS[chip].memory * GIB, error=str(error)[:300])
            found.compile_s, start = round(time.time() - start, 1), time.time()
            yield found
            if found.error:
                break


def describe(compiled: Any, row: Row, chip: str) -> Row:
    """Fills in what the compiler says of a program."""
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    row.arguments = memory.argument_size_in_bytes
    row.temporaries = (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    row.peak = memory.peak_memory_in_bytes
    row.memory = CHIPS[chip].memory * GIB
    row.collectives = count_collectives(text)
    row.largest_gather = largest_gather(text)
    if row.program in PROGRAMS[:2]:  # what a loop costs is not known: its body counts once
        row.seconds = estimate(costs["optimal_seconds"], costs["flops"] / CHIPS[chip].flops)
    return row


def estimate(stated: float, least: float) -> float:
    """The compiler's estimate of a run in seconds.

    It takes a second off for every instruction that it knows no time of.

    Args:
        stated: What it says.
        least: What the products take at least, which tells how many seconds are missing.
    """
    return stated + max(0, math.ceil(least - stated))


def count_collectives(text: str) -> dict[str, int]:
    """Instructions of a compiled program that speak to other chips, by kind."""
    kinds = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
    return {kind: kinds[kind] for kind in COLLECTIVES if kinds[kind]}


def largest_gather(text: str) -> int:
    """Bytes of the largest array that an all-gather of a compiled program makes."""
    sizes = [0]
    for made in re.findall(r"= (.*?) all-gather(?:-start)?\(", text):
        for bits, shape in re.findall(r"[a-z]+(\d+)\[([\d,]*)\]", made):
            sizes.append(int(bits) // 8 * math.prod(int(n) for n in shape.split(",") if n))
    return max(sizes)


def temporaries(compiled: Any) -> int:
    """Bytes a compiled program needs besides its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def attention_temporaries(chip: str = "v5e") -> dict[str, tuple[int, int]]:
    """Temporaries of attention over a 2048-token prompt, by size: Pallas' kernel and plain."""
    mesh, found = make_mesh(chip, (1, 1, 1)), {}
    whole = NamedSharding(mesh, PartitionSpec())
    for size in ("opt-125m", "opt-2.7b", "opt-175b"):  # head sizes 64, 80 and 128
        config = OPTConfig.from_preset(size)
        shape = (1, config.num_attention_heads, LENGTH, config.head_dim)
        states = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)] * 3
        kernels = (
            lambda q, k, v: attention.flash(q, k, v, None, None, 0.0, mesh),
            lambda q, k, v: attention.sdpa(q, k, v, None),
        )
        compiled = [jax.jit(kernel).lower(*states).compile() for kernel in kernels]
        sizes = [temporaries(c) for c in compiled]
        found[f"{size} (head size {config.head_dim})"] = (sizes[0], sizes[1])
    return found


HEADINGS = ("size", "chips", "data x fsdp x model", "program", "batch", "arguments", "temporaries",
            "peak", "of", "seconds", "collectives")  # fmt: skip

LEGEND = (
    "Arguments, temporaries and peak are GiB per chip, seconds the compiler's estimate of a run. "
    "AR, AG, RS, A2A and CP: all-reduce, all-gather, reduce-scatter, all-to-all, "
    "collective-permute instructions in the program; a loop's body counts once."
)


def cells(row: Row) -> tuple[str, ...]:
    """A row of the table."""
    short = {"all-reduce": "AR", "all-gather": "AG", "reduce-scatter": "RS", "all-to-all": "A2A",
             "collective-permute": "CP"}  # fmt: skip
    talk = ", ".join(f"{count} {short[kind]}" for kind, count in row.collectives.items())
    sizes = tuple(f"{value / GIB:.2f}" for value in (row.arguments, row.temporaries, row.peak))
    head = (row.size, f"{row.chips} {row.chip}", row.mesh, row.program, str(row.batch))
    if row.error:
        return (*head, "-", "-", "-", f"{row.memory // GIB}", "-", row.error.partition("\n")[0])
    seconds = "-" if row.seconds is None else f"{row.seconds:.4f}"
    return (*head, *sizes, f"{row.memory // GIB}", seconds, talk or "none")


def show(rows: list[Row], attention_sizes: dict[str, Any], markdown: bool) -> None:
    """Prints the tables."""
    measures = [
        (size, f"{ours / 2**20:.1f}", f"{plain / 2**20:.1f}", f"{ours / plain:.3f}")
        for size, (ours, plain) in attention_sizes.items()
    ]
    kinds = ("attention of", "Pallas, MiB", "plain, MiB", "ratio")
    for headings, lines in ((HEADINGS, [cells(row) for row in rows]), (kinds, measures)):
        if markdown:
            print("| " + " | ".join(headings) + " |\n" + "|---" * len(headings) + "|")
            print("\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n")
            continue
        table = Table(*headings)
        for line in lines:
            table.add_row(*line)
        Console(width=None if sys.stdout.isatty() else 140).print(table)
    print(LEGEND)


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", nargs="+", choices=MESHES, default=list(MESHES))
    parser.add_argument("--chip", nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--saved", action="store_true", help="print the results there are")
    parser.add_argument("--markdown", action="store_true", help="print tables for a README")
    args = parser.parse_args()
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": [], "attention": {}}
    rows = {(r["size"], r["chip"], r["program"]): Row(**r) for r in saved["rows"]}
    pairs = [(size, chip) for size in args.size for chip in args.chip]
    if not args.saved:
        saved["attention"] = attention_temporaries()
        for done, (size, chip) in enumerate(pairs):
            print(f"{size} on {chip} ({done + 1} of {len(pairs)})", file=sys.stderr, flush=True)
            for row in measure(size, chip, tuple(args.program)):
                rows[row.size, row.chip, row.program] = row
                print("   ", *cells(row)[1:], f"({row.compile_s} s)", file=sys.stderr, flush=True)
                kept = [asdict(rows[key]) for key in _ordered(rows)]
                text = json.dumps({"rows": kept, "attention": saved["attention"]}, indent=1)
                RESULTS.write_text(text + "\n")
    shown = [rows[k] for k in _ordered(rows) if k[:2] in pairs and k[2] in args.program]
    show(shown, saved["attention"], args.markdown)
    if any(row.error for row in shown):
        sys.exit(1)


def _ordered(keys: Any) -> list[tuple[str, str, str]]:
    order = [(s, c, p) for s in MESHES for c in CHIPS for p in PROGRAMS]
    return [key for key in order if key in keys]


if __name__ == "__main__":
    main()
