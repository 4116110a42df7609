"""The project's own source files, for tests of how it is built."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
BACKENDS = {"opt_torch": "", "opt_tf": "TF", "opt_flax": "Flax"}
"""Every backend and the prefix of its classes; the others are held to opt_torch, the first."""

PRESENT = [name for name in BACKENDS if (ROOT / name).is_dir()]
PACKAGES = ["opt_core", *PRESENT, "conversion", "opt_cli", "benchmarks"]


def python_files(package: str) -> list[Path]:
    """All Python files of a package, in order."""
    return sorted((ROOT / package).rglob("*.py"))
