"""The wheel, installed where no clone is: all its files, and a command that works."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
PACKAGES = ("opt_core", "opt_torch", "opt_tf", "opt_flax", "conversion", "opt_cli")
NOT_SOURCE = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds the wheel's files alone, built from the sources alone."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCE)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    run(sys.executable, "-c", build, cwd=folder / "source")
    (wheel,) = folder.glob("*.whl")
    options = ("--no-deps", "--no-index", "--no-compile", "--target")
    run(*pip, "install", *options, folder / "installed", wheel)
    return folder / "installed"


def run(*command: object, cwd: Path = Path("/"), **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(installed: Path, *arguments: object) -> str:
    """Runs Python with the installed files and the environment's libraries on its path.

    -S leaves out the environment's own hooks, an editable install of the clone among them.
    """
    libraries = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    path = os.pathsep.join([str(installed), *dict.fromkeys(libraries)])
    return run(sys.executable, "-S", *arguments, PYTHONPATH=path)


def test_it_holds_every_file_and_no_benchmark(installed: Path):
    (about,) = installed.glob("*.dist-info")
    assert {p.name for p in installed.iterdir()} == {*PACKAGES, "bin", about.name}
    for package in PACKAGES:
        found, expected = (
            {p.relative_to(root) for p in (root / package).rglob("*") if is_kept(p)}
            for root in (installed, ROOT)
        )
        assert found == expected
        assert (installed / package / "py.typed").exists()
    assert (installed / "opt_core" / "mini" / "model.safetensors").exists()


def is_kept(path: Path) -> bool:
    return path.is_file() and path.suffix != ".pyc" and not path.name.startswith(".")


def test_its_own_modules_are_those_that_run(installed: Path):
    code = (
        "import importlib.util, json, opt_core, opt_cli.main, conversion\n"
        "found = [module.__file__ for module in (opt_core, opt_cli.main, conversion)]\n"
        "print(json.dumps([*found, importlib.util.find_spec('benchmarks')]))"
    )
    core, command, converter, benchmarks = json.loads(python(installed, "-c", code))
    assert Path(core) == installed / "opt_core" / "__init__.py"
    assert Path(command) == installed / "opt_cli" / "main.py"
    assert Path(converter) == installed / "conversion" / "__init__.py"
    assert benchmarks is None


def test_the_command_works(installed: Path):
    command = installed / "bin" / "opt-lm"
    text = python(installed, command, "generate", "ROMEO:", "-m", "mini", "--greedy", "-n", 2)
    assert text.startswith("ROMEO:")
