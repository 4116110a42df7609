"""The shape of the house: one design for all backends, and short files that say what they hold."""

import ast
import fnmatch
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from itertools import chain, combinations
from pathlib import Path

import pytest

import opt_core
import tests.support.backends
from tests.support.source_tree import BACKENDS, PACKAGES, PRESENT, ROOT, python_files

OWN_FILES = {
    "opt_torch": {
        "distribution.py": "models in parts, which XLA does by itself",
        "generation/fast_decode.py": "a decode step without the cost of calling modules",
        "int4.py": "PyTorch's CPU kernel for 4-bit weights",
        "int8.py": "PyTorch's CPU products in integers",
        "offload.py": "weights that stay in files; XLA's programs hold them in memory",
    },
    "opt_tf": {
        "compilation.py": "generation is compiled by XLA",
        "keras_fit.py": "Keras' compile, fit, evaluate and predict",
        "keras_hub.py": "names and habits of KerasHub, which is Keras'",
        "named_inputs.py": "Keras' inputs come in dicts and tuples, and by place as tensors alone",
    },
    "opt_flax": {
        "compilation.py": "generation is compiled by XLA",
        "linen_params.py": "trees of parameters, which Flax' users keep outside of a model",
        "programs.py": "how well XLA compiles is chosen program by program",
        "training_checkpoints.py": "Orbax' checkpoints of a training on a mesh",
    },
}
"""Files for what one framework alone needs (so far), each with the reason."""

UNLIKE_FILES = {
    "_private.py": "each library hides other things",
    "compatibility.py": "users of each framework's transformers wrote other code",
}
"""Files that every backend has and whose names are not compared, each with the reason."""

OWN_NAMES = {
    "attention.py": {
        "PyTorch's and JAX' kernels, which TensorFlow lacks": {"flash", "check_flash"},
        "PyTorch's kernel takes rows without their padding": {"packed"},
        "a mesh may lie on devices that are not JAX' default": {"platform_of"},
    },
    "generation/beam.py": {
        "a whole generation as one program, for exports; PyTorch exports the forward pass": {"run"},
    },
    "cache.py": {"PyTorch's caches share buffers": {"USED_UP"}},
    "checkpoint.py": {
        "PyTorch has devices, and tied weights are one parameter": {
            *("check_device", "tie", "is_tied", "cast_tensor"),
        },
        "arrays that NumPy cannot hold or view": {"as_tensor", "as_array"},
        "parameters are placed on a mesh before they have values": {
            *("init_abstract", "parameter_path"),
        },
        "an array on a mesh is made of its parts": {"spread_values"},
        "parameters may be traced": {"set_arrays"},
    },
    "generation/prefill.py": {
        "Flax' takes a model in two parts, and is in `compilation`": {"read_prompts"}
    },
    "export.py": {
        "every framework has file formats of its own": {
            *("export_program", "export_saved_model", "export_tflite", "export_stablehlo"),
        },
        "a StableHLO program takes its weights as arguments": {
            *("PLATFORMS", "REFUSED", "Weights", "Program"),
        },
    },
    "generation/loop.py": {
        "a whole generation as one program, for exports and users' own programs; PyTorch exports "
        "the forward pass": {"run", "trace"},
    },
    "linear.py": {
        "PyTorch has a linear layer and an embedding that suit a head": {"Linear", "Embedding"},
        "Keras and Flax have no functional dropout": {"apply_dropout"},
        "TensorFlow knows some sizes only when a graph is run": {"sizes"},
        "XLA multiplies a few rows slowly on CPUs": {"FEW_ROWS", "linear"},
        "PyTorch's CPU products: packed weights, parts, blocks": {
            *(
                "is_eager",
                "has_custom_call",
                "apply_linear",
                "multiply",
                "make_linear",
                "BLOCK",
                "upcast_linear",
                "MANY_ROWS",
                "WORTHWHILE",
            ),
            *("packed", "pack", "using", "forget_packed", "fingerprint", "product_dtype"),
        },
    },
    "sharding.py": {
        "PyTorch and JAX have processes": {"Processes", "row_parts", "spread_rows"},
        "JAX' processes meet by themselves, torchrun brings PyTorch's together": {"connect"},
        "PyTorch's tensors on a mesh are of another class": {"is_spread"},
        "how long they wait for one another": {"HEARTBEAT", "LOST"},
        "PyTorch's processes ask where they are, and add up": {
            *("sizes_of", "place_of", "mesh_device", "OwnRows", "own_rows", "sum_rows", "agree"),
        },
        "GSPMD is told how arrays lie": {
            *("padded_rows", "partition", "constrain_rows", "rows_axes", "constrain_table"),
            *("replicate", "shard_batch", "place"),
        },
        "tf.distribute has replicas": {"spread_values", "sum_replicas"},
    },
    "serving/cache.py": {
        "TensorFlow writes variables in place; PyTorch's rows are views, and Flax' buffers are "
        "given away": {"VariableCache", "RowCache", "make_variables", "contents"},
    },
    "generation/sampling.py": {"JAX draws by keys": {"as_key", "drawn_key", "make_key"}},
    "quantization.py": {
        "Keras builds a layer before it has weights": {"prepare"},
        "PyTorch's CPU kernels": {"fused_linear", "bind", "make_fused_linear"},
    },
}
"""Names that not every backend has, by file and by reason."""

OWN_PARAMETERS = {
    "KVCache.advance": "TensorFlow's and Flax' caches are values and take the written buffers; "
    "PyTorch's is written in place",
    "OPTAttention.call": "TensorFlow has no kernel that takes the mask of padding",
    "OPTDecoderLayer.call": "TensorFlow has no kernel that takes the mask of padding; users' "
    "programs call PyTorch's layers themselves",
    "OPTPreTrainedModel.__init__": "Keras makes variables when a model is constructed, and "
    "`get_config` constructs it again: TensorFlow must know `quantize` there",
    "check_cache": "PyTorch's processes have some of a model's heads",
    "check_inputs": "PyTorch's processes have some of a model's heads",
    "init_cache": "PyTorch's processes have some of a model's heads",
    "make_mesh": "JAX may leave devices aside, and be told which",
    "prefill": "TensorFlow and Flax pad prompts to a bucket, hence their `length`; PyTorch reads "
    "exact lengths",
    "sdpa": "PyTorch's kernel applies dropout itself; elsewhere dropout takes the eager path",
}
"""Functions and methods (Class.method, without a backend's prefix) whose parameters differ: why."""

EXTRA_PARAMETERS = {
    "device": "PyTorch makes tensors on a device",
    "generator": "PyTorch's source of random numbers",
    "seed": "TensorFlow's source of random numbers",
    "key": "JAX' source of random numbers",
    "rngs": "NNX' source of random numbers",
    "training": "Keras' training mode is an argument of each call",
    "deterministic": "NNX' training mode is an argument of each call",
    "mesh": "PyTorch's and Flax' models are spread over devices",
    "offload": "PyTorch's weights can stay in their files",
    "scan_layers": "Flax' layers can be stacked",
    "dtype": "Keras' layers have a policy instead",
}
"""Parameters that a framework may have beside the common ones, and why."""

OWN_SUFFIXES = {"lora_A", "lora_B"}
"""Names whose last letter is no shape's: PEFT's own."""

MAX_LINES = 400
TOP_LEVEL = {
    *(".ci", ".github", ".gitignore", ".pre-commit-config.yaml", "CHANGELOG.md", "CITATION.cff"),
    *("CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "SECURITY.md", "docs"),
    *("mkdocs.yml", "pyproject.toml", "tests", *PACKAGES),
}


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


def own_names(name: str) -> set[str]:
    """Names of a file that not every backend has."""
    return set(chain.from_iterable(OWN_NAMES.get(name, {}).values()))


def signatures(path: Path, prefix: str) -> dict[str, list[str]]:
    """Parameters of public functions and methods; `forward` and `__call__` are called `call`."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found[node.name] = parameters(node)
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            kind = re.sub(rf"^{prefix}(?=OPT)", "", node.name)
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    name = {"forward": "call", "__call__": "call"}.get(method.name, method.name)
                    if not name.startswith("_") or name == "__init__":
                        found[f"{kind}.{name}"] = parameters(method)
    return found


def parameters(function: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters, `self` and `cls` aside."""
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


@cache
def shared_signatures() -> list[tuple[str, list[list[str]]]]:
    """Every function and method that all backends have in the same file, with its parameters."""
    shared: list[tuple[str, list[list[str]]]] = []
    for path in python_files("opt_torch"):
        files = [ROOT / backend / path.relative_to(ROOT / "opt_torch") for backend in PRESENT]
        if all(file.is_file() for file in files):
            each = [signatures(f, BACKENDS[b]) for f, b in zip(files, PRESENT, strict=True)]
            for name in each[0]:
                if all(name in found for found in each):
                    shared.append((name, [found[name] for found in each]))
    return shared


def differing(listed: dict[str, str], extra: dict[str, str]) -> dict[str, list[list[str]]]:
    """Shared signatures that do not agree, those listed and parameters that are extra aside."""
    found = {
        name: [[p for p in names if p not in extra] for names in each]
        for name, each in shared_signatures()
        if name not in listed
    }
    return {name: each for name, each in found.items() if any(p != each[0] for p in each)}


@pytest.mark.parametrize("backend", PRESENT)
def test_backends_have_the_same_files_and_names(backend: str):
    reference, other = (
        {str(p.relative_to(ROOT / name)): p for p in python_files(name)}
        for name in ("opt_torch", backend)
    )
    own, theirs = OWN_FILES["opt_torch"].keys(), OWN_FILES[backend].keys()
    assert other.keys() >= theirs
    assert reference.keys() - own == other.keys() - theirs
    for name in reference.keys() & other.keys() - UNLIKE_FILES.keys():
        ours, others = (
            [n for n in names if n not in own_names(name)]
            for names in (
                public_names(other[name], BACKENDS[backend]),
                public_names(reference[name], ""),
            )
        )
        assert ours == others, name


def test_shared_functions_have_the_same_parameters():
    assert not differing(OWN_PARAMETERS, EXTRA_PARAMETERS)


@pytest.mark.parametrize("pair", list(combinations(PRESENT, 2)), ids="-".join)
def test_functions_and_methods_come_in_the_same_order(pair: tuple[str, str]):
    """Those too that only these two backends have."""
    for path in python_files(pair[0]):
        files = [ROOT / backend / path.relative_to(ROOT / pair[0]) for backend in pair]
        if all(file.is_file() for file in files) and path.name not in UNLIKE_FILES:
            ours, theirs = (
                list(signatures(file, BACKENDS[backend]))
                for file, backend in zip(files, pair, strict=True)
            )
            common = [name for name in ours if name in theirs]
            assert common == [name for name in theirs if name in ours], path.name


def test_lists_of_exceptions_are_not_stale():
    """An entry that agrees after all, or is no more, may not stay."""
    assert OWN_PARAMETERS.keys() == differing({}, EXTRA_PARAMETERS).keys()
    for name in EXTRA_PARAMETERS:
        less = {other: why for other, why in EXTRA_PARAMETERS.items() if other != name}
        assert differing(OWN_PARAMETERS, less), name
    for files in OWN_FILES.values():
        for name in files:
            assert not all((ROOT / backend / name).exists() for backend in PRESENT), name
    for name in UNLIKE_FILES:
        each = [public_names(ROOT / backend / name, BACKENDS[backend]) for backend in PRESENT]
        assert any(names != each[0] for names in each), name
    assert not UNLIKE_FILES.keys() & OWN_NAMES.keys()
    for file in OWN_NAMES:
        paths = {ROOT / backend / file: prefix for backend, prefix in BACKENDS.items()}
        have = [set(public_names(p, prefix)) for p, prefix in paths.items() if p.exists()]
        listed = [name for names in OWN_NAMES[file].values() for name in names]
        assert len(listed) == len(set(listed)), file
        for name in listed:
            assert 0 < sum(name in names for names in have) < len(PRESENT), f"{file}: {name}"


def test_signatures_are_read_from_functions_and_methods(tmp_path: Path):
    file = tmp_path / "modeling.py"
    file.write_text(
        "def run(a, /, b, *, c=1): ...\ndef _hidden(x): ...\n"
        "class TFOPTModel:\n    def __init__(self, config): ...\n    def __call__(self, ids): ...\n"
        "    def _own(self): ...\n    @classmethod\n    def load(cls, path): ...\n"
    )
    assert signatures(file, "TF") == {
        "run": ["a", "b", "c"],
        "OPTModel.__init__": ["config"],
        "OPTModel.call": ["ids"],
        "OPTModel.load": ["path"],
    }


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


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_folders_are_not_crowded(package: str):
    folders = {path.parent for path in python_files(package)}
    crowded = {str(f.relative_to(ROOT)): n for f in folders if (n := len([*f.glob("*.py")])) > 26}
    assert not crowded


def test_helpers_of_tests_are_in_their_folder():
    stray = [
        str(path.relative_to(ROOT))
        for path in python_files("tests")
        if not path.name.startswith("test_") and path.name not in ("conftest.py", "__init__.py")
    ]
    assert not [path for path in stray if not path.startswith("tests/support/")]


def docstrings(tree: ast.AST) -> Iterator[str]:
    """Every text that stands where a statement does."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str):
                yield text


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_docstrings_begin_with_their_noun(package: str):
    found = [
        f"{path.relative_to(ROOT)}: {text.splitlines()[0]}"
        for path in python_files(package)
        for text in docstrings(ast.parse(path.read_text(encoding="utf-8")))
        if re.match(r"\s*What\b", text)
    ]
    assert not found


def shape_letters() -> set[str]:
    """The letters of the legend, "B batch", in `opt_core`."""
    return set(re.findall(r"\b([A-Z]) [a-z]", str(opt_core.__doc__).partition("alike:")[2]))


def letters_of(source: str) -> Iterator[tuple[str, set[str]]]:
    """Names such as `q_BHTK` and the letters behind their last underscore."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME and token.string not in OWN_SUFFIXES:
            match = re.fullmatch(r"[a-z]\w*_([A-Z0-9]*[A-Z][A-Z0-9]*)", token.string)
            if match:
                yield token.string, {letter for letter in match[1] if not letter.isdigit()}


@pytest.mark.parametrize("package", PACKAGES)
def test_shape_letters_are_those_of_the_legend(package: str):
    legend = shape_letters()
    assert {"B", "T", "D", "V"} <= legend
    unknown = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in python_files(package)
        for name, letters in letters_of(path.read_text(encoding="utf-8"))
        if not letters <= legend
    }
    assert not unknown


def test_shape_letters_are_found():
    source = "q_BHTK = f(bias_B1TS, MAX_SIZE, lora_A, x_, self.ids_BQ)"
    found = {"q_BHTK": set("BHTK"), "bias_B1TS": set("BTS"), "ids_BQ": set("BQ")}
    assert dict(letters_of(source)) == found


def test_the_top_level_holds_nothing_else():
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    patterns = [".git", *(line.rstrip("/") for line in ignored)]
    entries = {path.name for path in ROOT.iterdir()}
    stray = {e for e in entries - TOP_LEVEL if not any(fnmatch.fnmatch(e, p) for p in patterns)}
    assert not stray
