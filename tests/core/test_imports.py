"""The core, the conversions and the command's help load no framework, each in a fresh process."""

import ast
import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "transformers"}
HEAVY = {"huggingface_hub", "tokenizers", "typer", "rich", "h5py"}
DOORS = ("checkpoints", "data", "evaluation", "generation", "text", "training")
SHOW_HELP = """
import opt_cli.main
try:
    opt_cli.main.main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
"""


def modules_after(code: str) -> set[str]:
    """Names of the top-level modules loaded once the code has run."""
    report = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", code + report], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in json.loads(done.stderr.splitlines()[-1])}


@pytest.mark.parametrize("package", ["opt_core", "conversion", "opt_cli"])
def test_import_loads_no_framework(package: str):
    loaded = modules_after(f"import {package}")
    assert package in loaded
    assert not loaded & FRAMEWORKS


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["info", "--help"]])
def test_help_loads_no_framework(arguments: list[str]):
    loaded = modules_after(SHOW_HELP.format(arguments=arguments))
    assert "typer" in loaded
    assert not loaded & FRAMEWORKS


def test_import_of_the_core_waits_with_heavy_libraries():
    packages = ", ".join(f"opt_core.{name}" for name in DOORS)
    assert not modules_after(f"import opt_core, {packages}") & {*FRAMEWORKS, *HEAVY}


@pytest.mark.parametrize("package", DOORS)
def test_a_package_re_exports_what_it_lists(package: str):
    """Every name resolves, is what its module defines, and shares its name with no module."""
    module = import_module(f"opt_core.{package}")
    folder = ROOT / "opt_core" / package
    names: list[str] = module.__all__
    assert {*names} <= {*dir(module)}
    assert not {*names} & {path.stem for path in folder.glob("*.py")}
    for name in names:
        assert getattr(module, name).__module__.startswith(f"opt_core.{package}.")
    with pytest.raises(AttributeError, match=f"'opt_core.{package}' has no attribute 'Nothing'"):
        _ = module.Nothing
    # What type checkers see are the same names.
    imported = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith(f"opt_core.{package}.")
        for alias in node.names
    }
    assert imported == {*names}


def test_lazy_names_come_whatever_is_asked_for_first():
    """A module imported before its names, and a name in a fresh process."""
    code = "import opt_core.data.preparation, opt_core.data as data; assert callable(data.prepare)"
    assert "tokenizers" in modules_after(code)
    code = "from opt_core.data import *; assert callable(prepare) and callable(open_data)"
    assert "tokenizers" in modules_after(code)
