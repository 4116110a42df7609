"""The core, the conversions and the command's help load no framework, each in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FRAMEWORKS = {"torch", "tensorflow", "keras", "jax", "jaxlib", "flax", "transformers"}
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


@pytest.mark.parametrize("heavy", ["huggingface_hub", "tokenizers"])
def test_import_of_the_core_waits_with_heavy_libraries(heavy: str):
    assert heavy not in modules_after("import opt_core")
