"""Which way imports point, and that they point in no circle."""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

from tests.support.source_tree import BACKENDS, PACKAGES, ROOT, python_files

FRAMEWORKS = {
    "opt_torch": {"torch"},
    "opt_tf": {"tensorflow", "keras"},
    "opt_flax": {"jax", "jaxlib", "flax", "optax", "orbax"},
}
HEAVY = {*chain.from_iterable(FRAMEWORKS.values()), *BACKENDS, "transformers"}
OURS = {"opt_core", *BACKENDS, "conversion", "opt_cli", "benchmarks", "tests"}


@dataclass(frozen=True)
class Rule:
    """Imports of `HEAVY | OURS` allowed to a package: when it is loaded, in functions only."""

    at_import: set[str]
    inside_functions: set[str]


RULES = {
    "opt_core": Rule({"opt_core"}, set()),
    **{name: Rule({"opt_core", name, *FRAMEWORKS[name]}, set()) for name in BACKENDS},
    "conversion": Rule({"opt_core", "conversion"}, HEAVY - {"transformers"}),
    # `opt_cli/speed.py` imports a framework inside the function that measures its backend.
    "opt_cli": Rule({"opt_core", "conversion", "opt_cli"}, HEAVY - {"transformers"}),
}


EXCEPTIONS = {"opt_core/checkpoints/sources.py": {"conversion"}}
"""Imports inside functions of one file: `from_pretrained` reads formats that `conversion` knows."""


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


@pytest.mark.parametrize("package", [name for name in PACKAGES if name in RULES])
def test_imports_point_one_way(package: str):
    files = python_files(package)
    assert files
    found = {}
    for path in files:
        name, rule = str(path.relative_to(ROOT)), RULES[package]
        extra = EXCEPTIONS.get(name, set())
        rule = Rule(rule.at_import, rule.inside_functions | extra)
        source = path.read_text(encoding="utf-8")
        if wrong := breaches(source, rule):
            found[name] = wrong
        assert not extra or breaches(source, RULES[package]), f"{name} needs no exception"
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
        ("opt_cli", "def f():\n    import torch", 0),
        ("opt_cli", "import torch", 1),
        ("opt_cli", "def f():\n    import benchmarks", 1),
    ],
)
def test_the_import_rule_itself(package: str, source: str, count: int):
    assert len(breaches(source, RULES[package])) == count


def imported_modules(source: str, module: str, modules: Iterable[str]) -> set[str]:
    """Those of some modules that a module imports at run time, in its functions too.

    A name taken from a package is a module of it or, if there is none, of the package itself. To
    import a module loads the packages around it first, unless they are around the importer too.
    """
    found: set[str] = set()
    for name in _imported_names(ast.parse(source)):
        while name and name not in modules:
            name = name.rpartition(".")[0]
        while name:
            found |= {name} & set(modules)
            name = name.rpartition(".")[0]
            if f"{module}.".startswith(f"{name}."):
                break
    return found - {module}


def _imported_names(tree: ast.AST) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (str(a.value) for a in node.args[:1] if isinstance(a, ast.Constant))
        yield from _imported_names(node)


def in_circles(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The part of a graph that is left when ends and beginnings are taken off again and again."""
    while True:
        pointed_at = set(chain.from_iterable(graph.values()))
        left = {
            name: targets & graph.keys()
            for name, targets in graph.items()
            if targets & graph.keys() and name in pointed_at
        }
        if left == graph:
            return graph
        graph = left


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@pytest.mark.parametrize("package", PACKAGES)
def test_no_modules_import_one_another(package: str):
    sources = {module_of(p): p.read_text(encoding="utf-8") for p in python_files(package)}
    graph = {name: imported_modules(text, name, sources) for name, text in sources.items()}
    assert any(graph.values())
    assert not in_circles(graph)


@pytest.mark.parametrize(
    ("sources", "circle"),
    [
        ({"p.a": "from p import b", "p.b": "def f():\n    from p.a import x"}, "ab"),
        ({"p.a": "import p.b", "p.b": "from p.c import x", "p.c": "from p import a"}, "abc"),
        ({"p.a": "import p.b", "p.b": "if TYPE_CHECKING:\n    from p import a"}, ""),
        ({"p.a": "from p.b import a", "p.b": "import q", "p.c": "import p.a"}, ""),
        ({"p.a": "import_module('p.b')", "p.b": "import p.a\nimport p.c", "p.c": ""}, "ab"),
    ],
)
def test_the_circles_themselves(sources: dict[str, str], circle: str):
    graph = {name: imported_modules(text, name, sources) for name, text in sources.items()}
    assert in_circles(graph).keys() == {f"p.{letter}" for letter in circle}


def test_a_package_around_a_module_is_loaded_before_it():
    modules = {"p", "p.a", "p.a.x", "p.b", "p.b.y"}
    assert imported_modules("from p.a.x import f", "p.b.y", modules) == {"p.a", "p.a.x"}
    assert imported_modules("from p.a.x import f", "p.a.z", modules) == {"p.a.x"}
    assert imported_modules("from p.a import f", "p.a.z", modules) == {"p.a"}
