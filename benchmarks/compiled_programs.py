"""The programs of every official size, compiled for devices that are not there.

`tpu_compile` and `gpu_compile` say for which, and read what their compilers tell of a program. The
programs are those that `generate`, `stream` and `train_step` run; weights have no values, so any
machine will do.

Generation is for 8 rows of 2048 slots, training for 2048 tokens a row, with gradient checkpointing
and stacked layers; weights and AdamW's moments are bfloat16.
"""

import argparse
import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.compiled_tables import cells, show
from benchmarks.compiled_text import count_collectives, largest_gather
from opt_core import GenerationConfig, OPTConfig, TrainConfig
from opt_core.generation.request import Request
from opt_flax import FlaxOPTForCausalLM, attention, checkpoint, sharding, training
from opt_flax.compilation import Prompts, _read_prompts
from opt_flax.generation import loop
from opt_flax.generation.sampling import request_rules

GENERATION, TRAINING = ("prefill", "decode step"), ("training step",)
PROGRAMS = GENERATION + TRAINING
"""Those of the tables. The loop that `generate` runs has the step as its body."""
ROWS, LENGTH = 8, 2048
ATTENTION_SIZES = ("opt-125m", "opt-2.7b", "opt-175b")
"""One of each size of heads: 64, 80 and 128."""


@dataclass
class Row:
    """One program, compiled.

    Attributes:
        size: Name of the model.
        device: Kind of device.
        devices: How many.
        mesh: "data x fsdp x model".
        program: One of `PROGRAMS`.
        batch: Rows of the batch.
        arguments: Bytes per device: weights, cache, optimizer state.
        temporaries: Bytes per device besides, results and code included.
        peak: Most bytes per device in use at once.
        memory: Bytes a device has.
        collectives: Kind -> instructions in the program; a loop's body counts once.
        largest_gather: Bytes of the largest array gathered from other devices.
        compile_s: Time it took to compile.
        error: What the compiler said if it refused, or that the program does not fit.
    """

    size: str
    device: str
    devices: int
    mesh: str
    program: str
    batch: int
    arguments: int = 0
    temporaries: int = 0
    peak: int = 0
    memory: int = 0
    collectives: dict[str, int] = field(default_factory=dict)
    largest_gather: int = 0
    compile_s: float = 0.0
    error: str | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Fields that tell it from other rows."""
        return self.size, self.device, self.mesh, self.program


class Target(ABC):
    """A family of devices and its compiler.

    Attributes:
        results: File that keeps what was found.
        row: The kind of row.
        plans: Size -> kind of device -> meshes as "data x fsdp x model": those of generation,
            between commas, then a space and those of training.
        implementation: `attn_implementation` of the models.
        headings: Of the table's columns behind those that every table has.
        legend: A line below the table.
    """

    results: Path
    row: type[Row]
    plans: dict[str, dict[str, str]]
    implementation: str
    headings: tuple[str, ...]
    legend: str

    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """Kinds of devices."""

    @abstractmethod
    def make_mesh(self, kind: str, sizes: tuple[int, ...]) -> Mesh:
        """A mesh over so many devices."""

    @abstractmethod
    def memory(self, kind: str) -> int:
        """Bytes a device has."""

    @abstractmethod
    def describe(self, compiled: Any, row: Any, config: OPTConfig) -> None:
        """Fills in what only this compiler says of a program."""

    @abstractmethod
    def cells(self, row: Any) -> tuple[str, ...]:
        """The row's texts below `headings`."""

    @abstractmethod
    def attention(self, config: OPTConfig, mesh: Mesh) -> Callable[..., jax.Array]:
        """The kernel of a prompt's attention, for queries, keys and values (B, H, T, K)."""


def make_model(
    config: OPTConfig, mesh: Mesh, scan_layers: bool, implementation: str
) -> FlaxOPTForCausalLM:
    """A model in bfloat16 whose weights have places on the devices, and no values."""
    model = FlaxOPTForCausalLM(config, None, implementation, scan_layers, mesh)
    checkpoint.init_abstract(model, jnp.dtype(jnp.bfloat16))
    return model


def abstract_arguments(tree: Any, mesh: Mesh, shardings: Any = None) -> Any:
    """Shapes, types and places of what a program takes; what has no place yet is everywhere."""

    def one(value: Any, sharding: Any) -> Any:
        if isinstance(value, jax.ShapeDtypeStruct) and value.sharding is not None:
            return value
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    if shardings is None:
        shardings = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)
    return jax.tree.map(one, tree, shardings)


def lower_generation(
    config: OPTConfig, mesh: Mesh, implementation: str
) -> Iterator[tuple[str, Any]]:
    """The programs of `generate` and `stream`: yields each one's name, and it compiled.

    The cache that decoding takes lies as prefill leaves it.
    """
    model = make_model(config, mesh, False, implementation)
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


def lower_training(config: OPTConfig, mesh: Mesh, implementation: str) -> Iterator[tuple[str, Any]]:
    """The program of `train_step`: AdamW, dropout as configured, layers computed again."""
    rows = training_rows(mesh)
    model = make_model(config, mesh, True, implementation)
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


def training_rows(mesh: Mesh) -> int:
    """Rows of a batch of training: one for each part of it that the mesh makes, 8 at least."""
    return max(ROWS, mesh.shape["data"] * mesh.shape["fsdp"])


def _parameters(model: FlaxOPTForCausalLM) -> Any:
    return nnx.to_flat_state(nnx.state(model, nnx.Param))


def parse_plan(plan: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The meshes of generation and those of training in one of `Target.plans`."""
    generating, learning = (
        [tuple(int(n) for n in sizes.split("x")) for sizes in part.split(",")]
        for part in plan.split()
    )
    return generating, learning


def measure(target: Target, size: str, kind: str, wanted: tuple[str, ...]) -> Iterator[Any]:
    """Compiles a model's programs for one kind of device.

    Args:
        target: Whose device.
        size: Name of the model.
        kind: Kind of device.
        wanted: Programs of interest: a group is compiled for any one of it.

    Yields:
        A row for each program.
    """
    config = OPTConfig.from_preset(size)
    generating, learning = parse_plan(target.plans[size][kind])
    work = [(GENERATION, sizes, lower_generation) for sizes in generating]
    work += [(TRAINING, sizes, lower_training) for sizes in learning]
    for names, sizes, lower in work:
        if not set(names) & set(wanted):
            continue
        mesh, start = target.make_mesh(kind, sizes), time.time()
        batch = ROWS if lower is lower_generation else training_rows(mesh)
        label = " x ".join(map(str, sizes))
        made = lower(config, mesh, target.implementation)
        for name in names:
            row = target.row(size, kind, mesh.size, label, name, batch)
            row.memory = target.memory(kind)
            try:
                describe(target, next(made)[1], row, config)
            except jax.errors.JaxRuntimeError as error:
                row.error = str(error)[:300]
            row.compile_s, start = round(time.time() - start, 1), time.time()
            yield row
            if row.error:
                break


def describe(target: Target, compiled: Any, row: Row, config: OPTConfig) -> None:
    """Fills in what the compiler says of a program."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    row.arguments = memory.argument_size_in_bytes
    row.temporaries = (
        memory.temp_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
    row.peak = memory.peak_memory_in_bytes
    row.collectives = count_collectives(text)
    row.largest_gather = largest_gather(text)
    target.describe(compiled, row, config)


def temporaries(compiled: Any) -> int:
    """Bytes a compiled program needs besides its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def attention_temporaries(target: Target, kind: str) -> dict[str, tuple[int, int]]:
    """Temporaries of attention over a 2048-token prompt, by size: a kernel's and plain ones."""
    mesh, found = target.make_mesh(kind, (1, 1, 1)), {}
    whole = NamedSharding(mesh, PartitionSpec())
    for size in ATTENTION_SIZES:
        config = OPTConfig.from_preset(size)
        shape = (1, LENGTH, config.num_attention_heads, config.head_dim)
        states = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)] * 3
        kernels = (
            target.attention(config, mesh),
            lambda q, k, v: attention.eager(q, k, v, None, 0.0, None)[0],
        )
        sizes = [temporaries(_turned(kernel).lower(*states).compile()) for kernel in kernels]
        found[f"{size} (head size {config.head_dim})"] = (sizes[0], sizes[1])
    return found


def _turned(kernel: Callable[..., jax.Array]) -> Any:
    """A kernel as a program for what a layer's projections make: (B, T, H, K)."""
    return jax.jit(lambda *states: kernel(*(x.swapaxes(1, 2) for x in states)).swapaxes(1, 2))


def load(target: Target) -> tuple[list[Any], dict[str, Any]]:
    """The rows that were found before, in order, and the temporaries of attention."""
    if not target.results.exists():
        return [], {}
    saved = json.loads(target.results.read_text())
    rows = {row.key: row for row in (target.row(**fields) for fields in saved["rows"])}
    return [rows[key] for key in _ordered(target) if key in rows], saved["attention"]


def _ordered(target: Target) -> Iterator[tuple[str, str, str, str]]:
    for size, plans in target.plans.items():
        for kind, plan in plans.items():
            for names, meshes in zip((GENERATION, TRAINING), parse_plan(plan), strict=True):
                for sizes in meshes:
                    for name in names:
                        yield size, kind, " x ".join(map(str, sizes)), name


def main(target: Target, description: str) -> None:
    """Runs the command line of a target."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--size", nargs="+", choices=target.plans, default=list(target.plans))
    parser.add_argument("--device", nargs="+", choices=target.kinds(), default=target.kinds())
    parser.add_argument("--program", nargs="+", choices=PROGRAMS, default=PROGRAMS)
    parser.add_argument("--missing", action="store_true", help="only what has no results yet")
    parser.add_argument("--saved", action="store_true", help="print the results there are")
    parser.add_argument("--markdown", action="store_true", help="print tables in Markdown")
    args = parser.parse_args()
    found, sizes = load(target)
    rows = {row.key: row for row in found}
    order = list(_ordered(target))
    asked = {k for k in order if k[0] in args.size and k[1] in args.device and k[3] in args.program}
    if not args.saved:
        if not (sizes and args.missing):
            sizes = attention_temporaries(target, target.kinds()[0])
        missing = {key for key in asked if not args.missing or key not in rows}
        pairs = list(dict.fromkeys(key[:2] for key in order if key in missing))
        for done, (size, kind) in enumerate(pairs):
            print(f"{size} on {kind} ({done + 1} of {len(pairs)})", file=sys.stderr, flush=True)
            wanted = tuple({key[3] for key in missing if key[:2] == (size, kind)})
            for row in measure(target, size, kind, wanted):
                rows[row.key] = row
                line = cells(target, row)[1:]
                print("   ", *line, f"({row.compile_s} s)", file=sys.stderr, flush=True)
                kept = [asdict(rows[key]) for key in order if key in rows]
                text = json.dumps({"rows": kept, "attention": sizes}, indent=1)
                target.results.write_text(text + "\n")
    shown = [rows[key] for key in order if key in rows and key in asked]
    show(target, shown, sizes, args.markdown)
    if any(row.error for row in shown):
        sys.exit(1)
