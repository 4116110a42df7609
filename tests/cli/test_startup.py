"""`opt-lm generate` in processes of its own: what it writes between pipes, imports and compiles.

What costs a tenth of its time or more is not imported unless it is used.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.backends import BACKENDS
from tests.support.source_tree import BACKENDS as BACKEND_PACKAGES
from tests.support.source_tree import python_files
from tests.test_import_rules import imported_modules, module_of

UNUSED = {
    "torch": {
        *("tensorflow", "jax", "transformers", "tensorboard", "sympy"),
        *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp"),
        *("opt_torch.trainer", "opt_torch.export", "opt_torch.serving"),
    },
    "tf": {
        # TensorFlow itself imports JAX where there is one.
        *("torch", "transformers", "tensorboard", "opt_tf.trainer", "opt_tf.serving"),
    },
    "flax": {
        *("torch", "tensorflow", "transformers", "tensorboard", "orbax.checkpoint"),
        *("opt_flax.trainer", "opt_flax.export", "opt_flax.training_checkpoints"),
        *("opt_flax.serving", "jax.experimental.pallas.ops.tpu.splash_attention"),
    },
}
"""Backend -> modules."""

PROGRAM = """
import atexit, runpy, sys
names = sys.argv.pop(1).split(",")
atexit.register(lambda: print("imported:", *(n for n in names if n in sys.modules), end=""))
runpy.run_module("opt_cli", run_name="__main__", alter_sys=True)
"""


def generate(backend, model, prompt):
    """Standard output and error of `python -m opt_cli` between pipes, its last line checked."""
    names = ",".join(sorted(UNUSED[backend]))
    command = [sys.executable, "-c", PROGRAM, names, "generate", "--backend", backend, "-n", "2"]
    found = subprocess.run(
        [*command, "-m", str(model), "--greedy"], input=prompt, check=False, capture_output=True,
        text=True,
    )  # fmt: skip
    assert not found.returncode, found.stderr
    text, told = found.stdout.rsplit("imported:", 1)
    assert not told, f"imported:{told}"
    return text, found.stderr


@pytest.mark.parametrize("package", BACKEND_PACKAGES)
def test_models_lead_to_no_trainer_and_no_server(package):
    """Not even inside of functions: what needs no process to be seen."""
    sources = {module_of(path): path.read_text("utf-8") for path in python_files(package)}
    found, left = set(), {package}
    while left:
        found |= left
        left = {n for m in left for n in imported_modules(sources[m], m, sources)} - found
    assert f"{package}.modeling" in found
    unused = {f"{package}.{name}" for name in ("trainer", "training", "serving", "export")}
    assert unused <= sources.keys()
    assert not unused & found


def test_torch_between_pipes(texts):
    pytest.importorskip("torch")
    from opt_torch import OPTForCausalLM

    path, tokenizer = texts
    text, told = generate("torch", path, "Now is\n")
    ids = tokenizer(["Now is"], return_tensors="np").input_ids
    made = OPTForCausalLM.from_pretrained(path).generate(ids, max_new_tokens=2)
    assert text == tokenizer.decode(made[0].tolist(), skip_special_tokens=True) + "\n"
    assert "\x1b" not in text + told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(name, marks=pytest.mark.slow if name == "tf" else ())
        for name in BACKENDS
        if name != "torch"
    ],
)
def test_a_second_process_finds_the_programs_of_the_first(texts, monkeypatch, tmp_path, backend):
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_COMPILATION_CACHE_MAX_SIZE", "TF_XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # All are kept: which of them take a tenth of a second depends on the machine's load.
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    found, files = [], []
    for _ in range(2):
        found.append(generate(backend, texts[0], "Now is\n")[0])
        files.append({p: p.stat().st_mtime_ns for p in programs(tmp_path)})
    assert found[0] == found[1]
    assert files[0]
    assert files[0] == files[1]


def programs(folder: Path) -> list[Path]:
    """Files with a program in them; JAX notes beside each when it was read last."""
    found = (p for p in folder.rglob("*") if p.is_file())
    return [p for p in found if not p.name.endswith(("-atime", ".lockfile"))]
