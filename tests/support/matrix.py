"""The tests on every Python that is there, with the newest libraries and with the oldest.

    python -m tests.support.matrix                             # all; hours on two cores
    python -m tests.support.matrix 3.12 newest                 # rows whose name has these words
    python -m tests.support.matrix newest oldest -- tests/core    # with pytest's own arguments
    python -m tests.support.matrix --list

Rows of a Python: "newest" is what pip finds today; "oldest", on the oldest Python alone, has the
lower bounds of pyproject.toml as they are written there; "torch", "tf" and "flax" have that extra
alone, where `tests/support/extras.py` tries it before the tests of that backend run; "extras" adds
the small extras to flax, one after another. PYTHONS names other interpreters, as for make. Every
environment is made anew and removed after its row; --keep FOLDER has them made there once.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")
PYTHONS = "python3.11 python3.12 python3.13"
OLDEST_PYTHON = (3, 11)
BACKENDS = ("torch", "tf", "flax")
FURTHER = ("formats", "plots", "data", "tensorboard", "lm-eval", "serve", "interactive", "ray")
SHOWN = (
    "numpy", "torch", "tensorflow", "keras", "jax", "flax", "orbax-checkpoint", "optax",
    "transformers", "h5py", "pyarrow", "lm_eval",
)  # fmt: skip
"""Libraries whose versions the table says."""
PYTEST = ("-n", "auto", "--maxprocesses", "8", "--dist", "worksteal")
"""As in the Makefile."""
ASK = """
import importlib.metadata, json, sys
print(json.dumps({"python": sys.version.split()[0]} | {
    d.name.lower().replace("-", "_"): d.version for d in importlib.metadata.distributions()}))
"""
PASSED = re.compile(r"\d+ passed.* in .*")


class Failed(Exception):
    """A step that did not end well, in one line."""


@dataclass(frozen=True)
class Row:
    """One environment.

    Attributes:
        python: The interpreter.
        version: Its version, "3.12".
        kind: newest, oldest, extras, or a backend.
    """

    python: str
    version: str
    kind: str

    @property
    def name(self) -> str:
        """Its name in the table, by which it is chosen."""
        return f"{self.version} {self.kind}"


def lower_bounds(pyproject: Path) -> list[str]:
    """The oldest release that each requirement allows, as pip's constraints.

    Args:
        pyproject: The pyproject.toml.

    Raises:
        ValueError: A requirement has no lower bound.
    """
    project: dict[str, Any] = tomllib.loads(pyproject.read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    tested = [name for name in extras if name not in ("lint", "dev")]
    asked = [*project["dependencies"], *(r for name in tested for r in extras[name])]
    found: dict[str, str] = {}
    for requirement in asked:
        name = re.split(r"[\[><=;~! ]", requirement)[0]
        bound = re.search(r"[>=]=\s*([\w.]+)", requirement)
        if bound:
            found[name] = bound[1]
        elif name != project["name"]:
            raise ValueError(f"{pyproject}: {requirement}: expected a lower bound, >=, found none")
    return [f"{name}=={version}" for name, version in found.items()]


def rows(pythons: Iterable[str]) -> list[Row]:
    """Every row of every interpreter that runs, none twice."""
    found: dict[tuple[int, int], str] = {}
    for python in pythons:
        code = "import sys; print(*sys.version_info[:2])"
        done = subprocess.run(
            ["sh", "-c", f"{python} -c '{code}'"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            major, minor = map(int, done.stdout.split())
            if (major, minor) >= OLDEST_PYTHON:
                found.setdefault((major, minor), python)
    made: list[Row] = []
    for version in sorted(found):
        kinds = ["newest", *BACKENDS, "extras"]
        if version == OLDEST_PYTHON:
            kinds.insert(1, "oldest")
        made += [Row(found[version], "{}.{}".format(*version), kind) for kind in kinds]
    return made


class Environment:
    """A virtual environment of one row.

    Args:
        row: Which.
        folder: Where; one that is there is used as it is.
        wheel: The project's, for rows of what a user installs.
    """

    def __init__(self, row: Row, folder: Path, wheel: Path) -> None:
        self._row, self._wheel, self._folder = row, wheel, folder
        self._python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
        if not self._python.exists():
            self._step("venv", row.python, "-m", "venv", str(folder))

    def test(self, arguments: list[str]) -> str:
        """Installs, runs what the row is about, and says how it ended."""
        kind = self._row.kind
        if kind in ("newest", "oldest"):
            self._install_clone(is_oldest=kind == "oldest")
            return self._pytest(arguments)
        backend = kind if kind in BACKENDS else "flax"
        self._install(backend)
        if kind == "extras":
            for extra in FURTHER:
                self._install(f"{backend},{extra}")
                self._try(backend, extra)
            return f"{backend} + {', '.join(FURTHER)}: pass"
        self._try(backend)
        self._install(f"{backend},test-core")
        chosen = arguments or ["tests/core", "tests/shared", f"tests/{backend}"]
        return f"import, generate, train, export, eval: pass; {self._pytest(chosen, backend)}"

    def versions(self) -> dict[str, str]:
        """Of Python and of everything installed."""
        return json.loads(self._step("versions", str(self._python), "-c", ASK))

    def _install_clone(self, is_oldest: bool) -> None:
        constraints = self._folder / "oldest.txt"
        bounds = lower_bounds(ROOT / "pyproject.toml") if is_oldest else []
        constraints.write_text("\n".join(bounds), "utf-8")
        extras = "[test,tensorboard]"
        self._pip("-c", str(constraints), "--editable", f"{ROOT}{extras}")

    def _install(self, extras: str) -> None:
        self._pip(f"{self._wheel}[{extras}]")

    def _pip(self, *arguments: str) -> None:
        pip = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet")
        self._step("pip", str(self._python), *pip, *arguments)

    def _try(self, *arguments: str) -> None:
        program = ROOT / "tests" / "support" / "extras.py"
        self._step(f"extras {' '.join(arguments)}", str(self._python), "-P", program, *arguments)

    def _pytest(self, arguments: list[str], backend: str | None = None) -> str:
        backends = {"OPT_BACKENDS": backend} if backend else {}
        command = [self._python, "-m", "pytest", "-q", *PYTEST, *arguments]
        told = self._step("pytest", *command, **backends)
        summary = PASSED.search(told.splitlines()[-1])
        if summary is None:
            raise Failed(f"pytest ran nothing: {told.splitlines()[-1]}")
        return summary[0].strip("= ")

    def _step(self, name: str, *command: str | Path, **environment: str) -> str:
        """Runs a program in the clone; its output is shown where it fails."""
        threads = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        variables = os.environ | threads | environment
        variables.pop("PYTHONPATH", None)
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False
        )
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
            told = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
            raise Failed(f"{name} ended with {done.returncode}: {told}")
        return done.stdout


def build_wheel(folder: Path) -> Path:
    """The project's wheel, built from a copy: no build folder appears in the clone."""
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source]
    subprocess.run(pip, check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(row: Row, folder: Path, wheel: Path, arguments: list[str]) -> tuple[bool, str]:
    """Runs one row; whether it is green, and its line of the table."""
    started = time.perf_counter()
    versions: dict[str, str] = {}
    try:
        environment = Environment(row, folder, wheel)
        result, is_green = environment.test(arguments), True
        versions = environment.versions()
    except Failed as failure:
        result, is_green = f"**{failure}**", False
    libraries = ", ".join(
        f"{name} {versions[key]}" for name in SHOWN if (key := name.replace("-", "_")) in versions
    )
    python = versions.get("python", row.version)
    minutes = (time.perf_counter() - started) / 60
    return is_green, f"| {python} {row.kind} | {libraries} | {result} | {minutes:.0f} min |"


def main(arguments: list[str]) -> int:
    """Runs the rows that are asked for and prints the table; returns how many failed."""
    mine, _, pytests = (" ".join(arguments) + " ").partition(" -- ")
    parser = ArgumentParser(prog="python -m tests.support.matrix", description="See the docstring.")
    parser.add_argument("words", nargs="*", help="parts of the names of rows; none: all rows")
    parser.add_argument("--list", action="store_true", help="print the rows' names, run nothing")
    parser.add_argument("--keep", type=Path, help="folder of environments that stay")
    options = parser.parse_args(mine.split())
    every = rows(os.environ.get("PYTHONS", PYTHONS).split())
    versions = {row.version for row in every} & set(options.words)
    kinds = set(options.words) - versions
    if wrong := kinds - {row.kind for row in every}:
        parser.error(f"no row is called {sorted(wrong)}; rows: {[row.name for row in every]}")
    chosen = [
        row
        for row in every
        if row.version in (versions or {row.version}) and row.kind in (kinds or {row.kind})
    ]
    if options.list:
        print("\n".join(row.name for row in chosen))
        return 0
    table, failed = ["| Environment | Libraries | Result | Time |", "| --- | --- | --- | --- |"], 0
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        for row in chosen:
            place = (options.keep or Path(folder)).absolute() / row.name.replace(" ", "-")
            is_green, line = run(row, place, wheel, pytests.split())
            failed += not is_green
            table.append(line)
            print(line, flush=True)
            if not options.keep:
                shutil.rmtree(place, ignore_errors=True)
    print("\n".join(["", *table]))
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
