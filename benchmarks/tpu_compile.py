"""Compiles the programs of every official size for TPU slices, on a machine that has no TPU.

    python -m benchmarks.tpu_compile                               # the whole table
    python -m benchmarks.tpu_compile --size opt-175b --device v5p
    python -m benchmarks.tpu_compile --missing                     # what the file has not yet
    python -m benchmarks.tpu_compile --saved --markdown            # what was found before

The compiler (`pip install ".[tpu-compile]"`) is the one that runs where TPUs are, and it refuses
what does not fit: every figure is the compiler's, none is measured on a chip. What was found goes
to benchmarks/results/tpu.json. Which programs: see `compiled_programs`.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before jax is imported: it must not look for chips, nor may two compilers lock each other out.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import compiled_programs
from benchmarks.compiled_programs import GENERATION, Row, Target
from benchmarks.compiled_tables import GIB, talk
from opt_core import OPTConfig
from opt_flax import attention, sharding


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

PLANS = {
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
class ChipRow(Row):
    """One program, compiled for a TPU.

    Its peak has the chip's fast memory (0.1 GiB) in it.

    Attributes:
        seconds: The compiler's estimate of a run; None where it has none.
    """

    seconds: float | None = None


class TPU(Target):
    """TPUs and their compiler."""

    results = Path(__file__).parent / "results" / "tpu.json"
    row = ChipRow
    plans = PLANS
    implementation = "flash_attention_2"
    headings = ("seconds", "collectives")
    legend = (
        "Arguments, temporaries and peak are GiB per chip, seconds the compiler's estimate of a "
        "run. AR, AG, RS, A2A and CP: all-reduce, all-gather, reduce-scatter, all-to-all, "
        "collective-permute instructions in the program; a loop's body counts once."
    )

    def kinds(self) -> tuple[str, ...]:
        """v5e, v5p and v6e."""
        return tuple(CHIPS)

    def make_mesh(self, kind: str, sizes: tuple[int, ...]) -> Mesh:
        """A mesh over the smallest slice of so many chips."""
        shape = CHIPS[kind].slices[math.prod(sizes)]
        options = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{kind}:{shape}", **options
        )
        return sharding.make_mesh(*sizes, devices=described.devices)

    def memory(self, kind: str) -> int:
        """Bytes a chip has."""
        return CHIPS[kind].memory * GIB

    def describe(self, compiled: Any, row: ChipRow, config: OPTConfig) -> None:
        """Fills in the estimate of a run; what a loop costs is not known: its body counts once."""
        costs = compiled.cost_analysis()
        if row.program in GENERATION:
            least = costs["flops"] / CHIPS[row.device].flops
            row.seconds = estimate(costs["optimal_seconds"], least)

    def cells(self, row: ChipRow) -> tuple[str, ...]:
        """The estimate, and the collectives."""
        return "-" if row.seconds is None else f"{row.seconds:.4f}", talk(row)

    def attention(self, config: OPTConfig, mesh: Mesh) -> Callable[..., jax.Array]:
        """Pallas' kernel."""
        return lambda q, k, v: attention.flash(q, k, v, None, None, 0.0, mesh)


def estimate(stated: float, least: float) -> float:
    """The compiler's estimate of a run in seconds.

    It takes a second off for every instruction that it knows no time of.

    Args:
        stated: What it says.
        least: What the products take at least, which tells how many seconds are missing.
    """
    return stated + max(0, math.ceil(least - stated))


if __name__ == "__main__":
    compiled_programs.main(TPU(), __doc__ or "")
