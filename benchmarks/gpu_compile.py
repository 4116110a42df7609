"""Compiles the programs of every official size for GPUs, on a machine that has none.

    python -m benchmarks.gpu_compile                               # the whole table
    python -m benchmarks.gpu_compile --size opt-175b --device H200
    python -m benchmarks.gpu_compile --missing                     # what the file has not yet
    python -m benchmarks.gpu_compile --saved --markdown            # what was found before

XLA's compiler for GPUs needs no GPU, and none of CUDA's libraries but cuDNN, for its attention. In
an environment of its own, so that nothing else takes the plugin for a GPU:

    python -m venv .venv-gpu && .venv-gpu/bin/pip install ".[flax]" "jax==0.10.2"
    .venv-gpu/bin/pip install --no-deps jax-cuda13-plugin==0.10.2 jax-cuda13-pjrt==0.10.2 \\
        nvidia-cudnn-cu13
    .venv-gpu/bin/python -m benchmarks.gpu_compile

Every figure is read off the compiled program, none is measured on a card: memory, kernels, copies
of the cache, and the bytes that a decode step's kernels read and write. What a card would choose
by trying (which tiles, Triton's products or cuBLAS') is chosen here by rule. What was found goes to
benchmarks/results/gpu.json. Which programs: see `compiled_programs`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Before jax is imported: it must not look for a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import compiled_programs
from benchmarks.compiled_programs import LENGTH, ROWS, Row, Target
from benchmarks.compiled_tables import talk
from benchmarks.compiled_text import Program, count_copies, count_kernels, total_traffic
from opt_core import OPTConfig
from opt_core.mesh import AXES, divides, row_axes
from opt_flax import attention, sharding

PER_HOST = 8
FREE = 0.05
"""Share of a device's memory that is not the program's: the driver, libraries, fragments."""


@dataclass(frozen=True)
class Card:
    """One kind of GPU, as XLA's description of it wants it.

    Attributes:
        name: What the driver calls it.
        capability: Compute capability.
        memory: Bytes it has.
        bandwidth: Bytes per second of its memory.
        cores: Multiprocessors.
        lanes: float32 units of each.
        shared: Bytes of fast memory of each; a block may have 1 KiB less.
        cache: Bytes of its L2 cache.
        clock: GHz.
    """

    name: str
    capability: tuple[int, int]
    memory: int
    bandwidth: float
    cores: int
    lanes: int
    shared: int
    cache: int
    clock: float

    @property
    def target(self) -> str:
        """The description, a GpuTargetConfigProto in text."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared - 1024}
              core_count: {self.cores} fpus_per_core: {self.lanes} clock_rate_ghz: {self.clock}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              memory_bandwidth: {self.bandwidth:.0f} l2_cache_size: {self.cache}
              device_memory_size: {self.memory}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


CARDS = {
    "A100": Card("NVIDIA A100-SXM4-80GB", (8, 0), 85_100_068_864, 2.039e12, 108, 64, 167_936,
                 40 * 2**20, 1.41),
    "H100": Card("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 3.352e12, 132, 128, 233_472,
                 50 * 2**20, 1.98),
    "H200": Card("NVIDIA H200 141GB HBM3e", (9, 0), 151_397_597_184, 4.8e12, 132, 128, 233_472,
                 50 * 2**20, 1.98),
}  # fmt: skip
"""Sources: NVIDIA's data sheets; memory as the driver tells it."""

PLANS = {
    "opt-125m": {"A100": "1x1x1 1x1x1", "H100": "1x1x1 1x1x1", "H200": "1x1x1 1x1x1"},
    "opt-350m": {"A100": "1x1x1 1x1x1", "H100": "1x1x1 1x1x1", "H200": "1x1x1 1x1x1"},
    "opt-1.3b": {"A100": "1x1x1 1x1x1", "H100": "1x1x1 1x1x1", "H200": "1x1x1 1x1x1"},
    "opt-2.7b": {"A100": "1x1x1 1x1x1", "H100": "1x1x1 1x1x1", "H200": "1x1x1 1x1x1"},
    "opt-6.7b": {"A100": "1x1x1 1x1x1", "H100": "1x1x1 1x1x1", "H200": "1x1x1 1x1x1"},
    "opt-13b": {"A100": "1x1x1 1x2x1", "H100": "1x1x1 1x2x1", "H200": "1x1x1 1x1x1"},
    "opt-30b": {"A100": "1x1x2 1x4x1", "H100": "1x1x2 1x4x1", "H200": "1x1x1 1x4x1"},
    "opt-66b": {"A100": "1x1x4 1x16x1", "H100": "1x1x4 1x16x1", "H200": "1x1x2 1x8x1"},
    "opt-175b": {
        "A100": "1x1x8 1x32x1",
        "H100": "1x1x8,1x2x8 1x32x1",
        "H200": "1x1x4,1x1x8 1x16x1",
    },
}
"""Size -> card -> data x fsdp x model for generation, and for training."""


@dataclass
class CardRow(Row):
    """One program, compiled for a GPU.

    Attributes:
        kernels: Kernels by kind; a loop's body counts once.
        copies: Arrays of a cache buffer's size that it makes instead of writing in place.
        moved: Bytes that its kernels read and write per device; 0 where loops hide it.
    """

    kernels: dict[str, int] = field(default_factory=dict)
    copies: int = 0
    moved: int = 0


class GPU(Target):
    """GPUs and XLA's compiler for them."""

    results = Path(__file__).parent / "results" / "gpu.json"
    row = CardRow
    plans = PLANS
    implementation = "sdpa"
    headings = ("moved / given", "copies", "kernels", "collectives")
    legend = (
        "Arguments, temporaries and peak are GiB per GPU. Moved / given: bytes that a decode "
        "step's kernels read and write, to weights and cache. Copies: of cache buffers. Kernels: "
        "all, those of products, cuDNN's attention. AR, AG, "
        "RS, A2A and CP: all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute "
        "instructions in the program; a loop's body counts once."
    )

    def kinds(self) -> tuple[str, ...]:
        """A100, H100 and H200."""
        return tuple(CARDS)

    def make_mesh(self, kind: str, sizes: tuple[int, ...]) -> Mesh:
        """A mesh over hosts of 8 GPUs each."""
        count = math.prod(sizes)
        hosts = -(-count // PER_HOST)
        described = topologies.get_topology_desc(
            platform="cuda",
            topology_name=kind,
            topology=f"{hosts}x{count // hosts}x1",
            target_config=CARDS[kind].target,
        )
        return sharding.make_mesh(*sizes, devices=described.devices)

    def memory(self, kind: str) -> int:
        """Bytes a card has."""
        return CARDS[kind].memory

    def describe(self, compiled: Any, row: CardRow, config: OPTConfig) -> None:
        """Fills in kernels, copies and traffic, and whether it fits: this compiler refuses none."""
        program = Program(compiled.as_text())
        row.kernels = count_kernels(program)
        if row.program in ("decode step", "decode loop"):
            row.copies = count_copies(program, buffer_shape(config, row.mesh), 2)
        if row.program == "decode step":
            row.moved = total_traffic(program)
        if row.peak > (1 - FREE) * row.memory:
            row.error = f"it needs {row.peak / row.memory:.0%} of the memory"

    def cells(self, row: CardRow) -> tuple[str, ...]:
        """Traffic, copies, kernels and collectives."""
        moved = f"{row.moved / row.arguments:.3f}" if row.moved else "-"
        copies = str(row.copies) if "decode" in row.program else "-"
        products = sum(n for kind, n in row.kernels.items() if kind.endswith("product"))
        kernels = (sum(row.kernels.values()), products, row.kernels.get("cuDNN attention", 0))
        return moved, copies, " / ".join(map(str, kernels)), talk(row)

    def attention(self, config: OPTConfig, mesh: Mesh) -> Callable[..., jax.Array]:
        """That of the default implementation."""
        return lambda q, k, v: attention.sdpa(q, k, v, None, mesh)


def buffer_shape(config: OPTConfig, mesh: str) -> tuple[int, ...]:
    """Shape (B, H, S, K) of a layer's keys on one device of a mesh "data x fsdp x model"."""
    sizes: dict[str, int] = dict(zip(AXES, map(int, mesh.split(" x ")), strict=True))
    rows = ROWS // math.prod(sizes[axis] for axis in row_axes(ROWS, sizes))
    heads = config.num_attention_heads
    heads //= sizes["model"] if divides(heads, "model", sizes) else 1
    return rows, heads, LENGTH, config.head_dim


if __name__ == "__main__":
    compiled_programs.main(GPU(), __doc__ or "")
