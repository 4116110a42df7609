"""Fixtures of every test: the frameworks set to full precision, and tiny models on disk."""

import gc
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest

from opt_cli.compilation_cache import keep_programs
from opt_core.checkpoints.save import save_checkpoint
from opt_core.config import OPTConfig
from opt_core.params import Head, param_specs
from opt_core.text.tokenizer import OPTTokenizer
from tests.support.backends import BACKENDS, Backend, make_backend
from tests.support.command_line import Run, make_run
from tests.support.configs import CONFIGS
from tests.support.tiers import deal

XLA_FLAGS = (
    # Eight devices of one CPU are enough to test what meshes do.
    "--xla_force_host_platform_device_count=8",
    # Programs here run once or twice: LLVM would work on them for longer than they run. What XLA
    # itself makes of a program (fusion, buffers, collectives) stays as it is for users.
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    # No more of it side by side than a worker has threads for.
    "--xla_cpu_parallel_codegen_split_count=1",
)
OLD_XLA_FLAGS = ("--xla_cpu_use_fusion_emitters=false",)
"""Loops are written in LLVM's language at once, not by way of MLIR. jaxlib 0.12 ends a process that
is told so; 0.10 is what was tried."""


def xla_flags() -> tuple[str, ...]:
    """The flags that the XLA of this environment knows."""
    version = metadata.version("jaxlib") if importlib.util.find_spec("jaxlib") else "0"
    is_old = tuple(map(int, version.split(".")[:2])) <= (0, 10)
    return (*XLA_FLAGS, *OLD_XLA_FLAGS) if is_old else XLA_FLAGS


# Before any framework is imported: JAX and TensorFlow read these once.
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *xla_flags()]).strip()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Tiny tensors gain nothing from more threads, which wait for one another.
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
# Workers and the processes they start share what XLA compiles.
os.environ.setdefault("XDG_CACHE_HOME", str(Path(__file__).parents[1] / ".pytest_cache"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", "-1")  # counting thousands takes time
keep_programs()
if importlib.util.find_spec("triton"):
    # CUDA builds of torch bring it. Both carry LLVM: loaded after TensorFlow it ends the process.
    importlib.import_module("triton")


# Three frameworks and thousands of tests are millions of objects, which Python's collector would go
# through hundreds of times: it rests while they come, and leaves them out afterwards.
gc.disable()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)
    gc.enable()


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what is slow
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    deal(items, BACKENDS)


@pytest.fixture
def opt_lm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command: `code, out, err = opt_lm("info", folder)`; `stdin=` is its input."""
    return make_run(monkeypatch, capsys)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Each framework in turn."""
    return make_backend(request.param)


@pytest.fixture(autouse=True)
def graphs_where_xla_is_not_asked_for(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XLA compiles each of TensorFlow's programs for seconds; their graphs run at once."""
    if "tf" not in BACKENDS or not uses_tf(request):
        return
    importlib.import_module("tests.support.backend_tf")
    if request.node.get_closest_marker("xla"):
        monkeypatch.setattr("opt_tf.compilation.SMALL", 0)
        return
    monkeypatch.setattr("opt_tf.compilation.SMALL", sys.maxsize)
    # Keras has XLA compile what it fits, unless it is told otherwise.
    monkeypatch.setattr("keras.src.trainers.trainer.model_supports_jit", lambda model: False)


def uses_tf(request: pytest.FixtureRequest) -> bool:
    """Whether a test may run it: by its backend or, where it has none, by what is loaded."""
    if "backend" in request.fixturenames:
        backend = request.getfixturevalue("backend")
        if isinstance(backend, Backend):
            return backend.name == "tf"
    return "opt_tf" in sys.modules or request.path.parent.name in ("tf", "tests")


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_dropped() -> Iterator[None]:
    """A worker would keep gigabytes of them otherwise; up to a few, the next module uses them."""
    yield
    if memory_in_use() > limit_of_memory[0]:
        if "jax" in sys.modules:
            sys.modules["jax"].clear_caches()
        gc.unfreeze()
        gc.collect()
        # The system may not get it back: what grows from here on counts.
        limit_of_memory[0] = max(limit_of_memory[0], memory_in_use() + (1 << 30))
    gc.freeze()  # what is left is not gone through again with all that comes


limit_of_memory = [3 << 30]
"""Bytes of the process at which programs are dropped."""


def memory_in_use() -> int:
    """Bytes of this process, as good as more than any limit where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return sys.maxsize
    return pages * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes (once) the folder of a tiny model: `folder("pre_ln")`, `folder(config, head, seed=1)`.

    Its weights are `tests.support.oracle.random_params(config, head, seed)`.
    """
    from tests.support.oracle import random_params

    made: dict[tuple[OPTConfig, Head, int], Path] = {}

    def make(config: str | OPTConfig, head: Head = "causal_lm", seed: int = 0) -> Path:
        config = CONFIGS[config] if isinstance(config, str) else config
        key = (config, head, seed)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("model")
            params = random_params(config, head, seed)
            fetch = {name: lambda value=value: value for name, value in params.items()}
            save_checkpoint(made[key], config, fetch, param_specs(config, head), "float32")
        return made[key]

    return make


@pytest.fixture(autouse=True, scope="session")
def torch_is_quiet() -> None:
    """One thread: tiny models gain nothing from more, and two test workers share two cores."""
    if importlib.util.find_spec("torch"):
        import torch

        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, OPTTokenizer]:
    """A tiny model with a tokenizer: its folder and the tokenizer."""
    from tests.support.files.tiny_folder import save_model

    path = save_model(tmp_path_factory.mktemp("texts") / "model")
    return path, OPTTokenizer.from_pretrained(path)
