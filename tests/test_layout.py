"""The shape of the house: which way imports point, and one design for all backends."""

import ast
import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

import tests.support.backends

ROOT = Path(__file__).parents[1]
BACKENDS = {"opt_torch": "", "opt_tf": "TF", "opt_flax": "Flax"}
"""Every backend and the prefix of its classes; the others are held to opt_torch, the first."""

OWN_FILES = {
    "opt_torch": {"fast_decode.py"},
    "opt_tf": {"compilation.py", "keras_fit.py"},
    "opt_flax": {"compilation.py", "sharding.py", "training_checkpoints.py"},
}
"""Files for what a framework alone needs (so far): a step without modules, programs,
Keras' fit, meshes."""

OWN_NAMES = {
    "attention.py": {"flash", "packed", "check_flash", "apply_dropout", "platform_of"},
    "checkpoint.py": {
        *("check_device", "tie", "is_tied", "cast_tensor", "as_tensor", "as_array"),
        *("init_abstract", "parameter_path"),
    },
    "cache.py": {"USED_UP"},
    "export.py": {
        *("export_program", "export_saved_model", "export_tflite", "export_stablehlo"),
        *("PLATFORMS", "REFUSED", "Weights", "Program"),
    },
    "generation.py": {"bucketed"},
    "losses.py": {"CHUNK", "chunked_causal_lm"},
    "quantization.py": {"prepare", "HAS_INTEGERS", "products", "project", "scaled"},
    "linear.py": {
        "is_eager",
        "has_custom_call",
        "BLOCK",
        "upcast_linear",
        "FEW_ROWS",
        "MANY_ROWS",
        "product",
        "sizes",
        "Embedding",
        "WORTHWHILE",
        "packed",
        "fingerprint",
        "available_memory",
        "apply_dropout",
    },
}
"""Names that not every backend has: kernels, devices, tied parameters and memory layouts differ."""

PRESENT = [name for name in BACKENDS if (ROOT / name).is_dir()]
PACKAGES = ["opt_core", *PRESENT, "conversion", "opt_cli", "benchmarks"]
MAX_LINES = 400
TOP_LEVEL = {
    *(".ci", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE"),
    *("Makefile", "README.md", "pyproject.toml", "tests", *PACKAGES),
}

FRAMEWORKS = {
    "opt_torch": {"torch"},
    "opt_tf": {"tensorflow", "keras"},
    "opt_flax": {"jax", "jaxlib", "flax", "optax", "orbax"},
}
HEAVY = {*chain.from_iterable(FRAMEWORKS.values()), *BACKENDS, "transformers"}
OURS = {"opt_core", *BACKENDS, "conversion", "opt_cli", "benchmarks", "tests"}


@dataclass(frozen=True)
class Rule:
    """What a package may import of `HEAVY | OURS`: when it is loaded, and inside functions only."""

    at_import: set[str]
    inside_functions: set[str]


RULES = {
    "opt_core": Rule({"opt_core"}, set()),
    **{name: Rule({"opt_core", name, *FRAMEWORKS[name]}, set()) for name in BACKENDS},
    "conversion": Rule({"opt_core", "conversion"}, HEAVY - {"transformers"}),
    "opt_cli": Rule({"opt_core", "conversion", "opt_cli"}, {*BACKENDS, "benchmarks"}),
}


def python_files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST, lazy: bool = False) -> Iterator[tuple[str, bool]]:
    """Every imported top-level name, and whether it is imported only when asked (or for types)."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.partition(".")[0], lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield (node.module or "").partition(".")[0], lazy
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant):
                    yield str(argument.value).partition(".")[0], lazy
        for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(node, lazy or inside or for_types)


def breaches(source: str, rule: Rule) -> list[str]:
    """Imports in a source text that its package's rule does not allow."""
    found = []
    for name, lazy in imports(ast.parse(source)):
        allowed = rule.at_import | rule.inside_functions if lazy else rule.at_import
        if name in HEAVY | OURS and name not in allowed:
            found.append(f"{name} ({'inside a function' if lazy else 'at import'})")
    return found


def public_names(path: Path, prefix: str) -> list[str]:
    """Public functions, classes and constants of a file in their order, class prefix taken off."""
    names: list[str] = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [re.sub(rf"^{prefix}(?=OPT)", "", name) for name in names if not name.startswith("_")]


def test_the_reference_backend_exists():
    assert PRESENT[:1] == ["opt_torch"]


@pytest.mark.parametrize("package", [name for name in PACKAGES if name in RULES])
def test_imports_point_one_way(package: str):
    files = python_files(package)
    assert files
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in files
        if (wrong := breaches(path.read_text(encoding="utf-8"), RULES[package]))
    }
    assert not found


@pytest.mark.parametrize(
    ("package", "source", "count"),
    [
        ("opt_core", "import torch", 1),
        ("opt_core", "def f():\n    from torch import nn", 1),
        ("opt_core", "from conversion import describe", 1),
        ("opt_torch", "import torch.nn\nfrom opt_core import OPTConfig", 0),
        ("opt_torch", "def f():\n    import opt_tf, jax", 2),
        ("opt_torch", "import transformers", 1),
        ("conversion", "import opt_torch", 1),
        ("conversion", "import importlib\nimportlib.import_module('opt_flax')", 1),
        ("conversion", "def f():\n    import opt_torch, tensorflow", 0),
        ("conversion", "def f():\n    import opt_cli", 1),
        ("opt_cli", "if TYPE_CHECKING:\n    import opt_torch", 0),
        ("opt_cli", "if 1:\n    import opt_torch", 1),
    ],
)
def test_the_import_rule_itself(package: str, source: str, count: int):
    assert len(breaches(source, RULES[package])) == count


@pytest.mark.parametrize("backend", PRESENT)
def test_backends_have_the_same_files_and_names(backend: str):
    reference, other = (
        {str(p.relative_to(ROOT / name)): p for p in python_files(name)}
        for name in ("opt_torch", backend)
    )
    assert other.keys() >= OWN_FILES[backend]
    assert reference.keys() - OWN_FILES["opt_torch"] == other.keys() - OWN_FILES[backend]
    for name in reference.keys() & other.keys():
        ours, theirs = (
            [n for n in names if n not in OWN_NAMES.get(name, ())]
            for names in (
                public_names(other[name], BACKENDS[backend]),
                public_names(reference[name], ""),
            )
        )
        assert ours == theirs, name


def test_tests_run_on_every_backend():
    assert [f"opt_{name}" for name in tests.support.backends.BACKENDS] == PRESENT


def test_public_names_are_compared_without_the_prefix_of_classes(tmp_path: Path):
    file = tmp_path / "modeling.py"
    file.write_text("LIMIT = 3\nclass TFOPTModel: ...\nclass _Hidden: ...\ndef forward(): ...\n")
    assert public_names(file, "TF") == ["LIMIT", "OPTModel", "forward"]


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short_and_named_for_what_they_hold(package: str):
    for path in python_files(package):
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MAX_LINES, f"{path.relative_to(ROOT)} has {lines} lines"
        assert path.stem not in {"utils", "util", "helpers", "misc", "common"}, path


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_have_docstrings(package: str):
    missing: list[str] = []
    for path in python_files(package):
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in (module, *module.body):
            name = getattr(node, "name", "module")
            documented = isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            if documented and not name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert not missing


def test_the_top_level_holds_nothing_else():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    patterns = [".git", *(line.rstrip("/") for line in ignored)]
    entries = {path.name for path in ROOT.iterdir()}
    stray = {e for e in entries - TOP_LEVEL if not any(fnmatch.fnmatch(e, p) for p in patterns)}
    assert not stray
