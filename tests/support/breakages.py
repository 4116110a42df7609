"""Twenty-five ways to break the code, each of which the fast tests have to see.

    python -m tests.support.breakages            # all of them, one after another
    python -m tests.support.breakages tf flax    # those whose name or file has one of the words

Each is a change of one place such as slips into a commit: an end that is off by one, a mask that is
forgotten, a constant in the wrong place. It is made in a copy of the tree, against which the tests
of its part run until one fails. `tests/test_breakages.py` holds that the places are still there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "*.egg-info")


@dataclass(frozen=True)
class Breakage:
    """One change.

    Attributes:
        name: What is wrong with it.
        file: Where, from the root of the tree.
        right: What stands there, once.
        wrong: What stands there instead.
        tests: Files or folders whose fast tests have to fail.
    """

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]

    @property
    def backend(self) -> str | None:
        """The framework it is in; None: in none of them."""
        package = self.file.partition("/")[0]
        return package.removeprefix("opt_") if package[4:] in ("torch", "tf", "flax") else None

    def apply(self, root: Path) -> None:
        """Makes the change in a copy of the tree."""
        path = root / self.file
        path.write_text(path.read_text("utf-8").replace(self.right, self.wrong), "utf-8")


BREAKAGES = (
    Breakage(
        "a stop string that begins in an earlier token loses its first byte",
        "opt_core/text/detokenizer.py",
        "max(map(len, self._stops)) + 1) :]",
        "max(map(len, self._stops)) + 2) :]",
        ("tests/core/text",),
    ),
    Breakage(
        "the first step of a warm-up does not move",
        "opt_core/training/config.py",
        "self.learning_rate * (step + 1) / self.warmup_steps",
        "self.learning_rate * step / self.warmup_steps",
        ("tests/core/training",),
    ),
    Breakage(
        "parts of a batch weigh alike, however many labels they have",
        "opt_core/training/microbatches.py",
        "yield part, labels / total",
        "yield part, 1 / count",
        ("tests/core/training",),
    ),
    Breakage(
        "windows of a long context leave gaps instead of overlapping",
        "opt_core/data/squad.py",
        "max(1, count - stride), room - stride)",
        "max(1, count - stride), room)",
        ("tests/core/data",),
    ),
    Breakage(
        "overlapping windows count one token twice",
        "opt_core/evaluation/perplexity.py",
        "first = max(done - start, 1)",
        "first = max(done - start - 1, 1)",
        ("tests/core/evaluation",),
    ),
    Breakage(
        "int4's zero point is rounded down",
        "opt_core/quantization.py",
        "np.clip(np.rint(-low / scales), 0, 15)",
        "np.clip(np.floor(-low / scales), 0, 15)",
        ("tests/core/test_quantization.py",),
    ),
    Breakage(
        "a draft does not look at the last place before the end",
        "opt_core/generation/speculation.py",
        "sliding_window_view(ids[:-1], size)",
        "sliding_window_view(ids[:-2], size)",
        ("tests/core/generation",),
    ),
    Breakage(
        "metaseq's joined projections are taken in another order",
        "conversion/formats/metaseq.py",
        'zip("kvq", _split_qkv(tensor), strict=True)',
        'zip("qkv", _split_qkv(tensor), strict=True)',
        ("tests/conversion/test_metaseq.py",),
    ),
    Breakage(
        "activations that do not scale with their input are smoothed",
        "conversion/smoothquant.py",
        'if config.activation_function == "relu":',
        'if config.activation_function != "silu":',
        ("tests/conversion/test_smoothquant.py",),
    ),
    Breakage(
        "an option of the command line goes astray",
        "opt_cli/generate.py",
        '"top_k": top_k, "top_p": top_p, "min_p": min_p,',
        '"top_k": top_k, "top_p": top_p, "min_p": top_p,',
        ("tests/cli/test_commands.py",),
    ),
    Breakage(
        "a padded query before the first token is not a number",
        "opt_torch/attention.py",
        "may = may | ~may.any(-1, keepdim=True)",
        "may = may | False",
        ("tests/shared/test_cache.py", "tests/shared/test_forward.py"),
    ),
    Breakage(
        "biases and norms decay too",
        "opt_torch/training.py",
        "config.weight_decay if decays else 0.0",
        "config.weight_decay",
        ("tests/shared/test_training.py",),
    ),
    Breakage(
        "beams that may still win are given up",
        "opt_torch/generation/beam.py",
        "length = limit if rules.is_hopeful else made",
        "length = made",
        ("tests/shared/test_beam.py",),
    ),
    Breakage(
        "drafted tokens are accepted too rarely",
        "opt_torch/generation/speculative.py",
        "(is_drafted & (chance * q < p))",
        "(is_drafted & (chance < p))",
        ("tests/shared/test_speculative.py",),
    ),
    Breakage(
        "a cache that goes back keeps one slot of forgotten padding",
        "opt_tf/cache.py",
        "tf.range(self.max_length) >= length",
        "tf.range(self.max_length) > length",
        ("tests/shared/test_prefix.py",),
    ),
    Breakage(
        "a norm's shift decays",
        "opt_tf/training.py",
        "(bias|gamma|beta)",
        "(bias|gamma)",
        ("tests/tf/test_backend.py", "tests/shared/test_training.py"),
    ),
    Breakage(
        "the loss in chunks forgets what smoothing asks of every token",
        "opt_tf/losses.py",
        "tf.cast(is_target, dtype) - smoothing / V",
        "tf.cast(is_target, dtype)",
        ("tests/shared/test_losses.py", "tests/shared/test_training.py"),
    ),
    Breakage(
        "pieces of a long text see as if each were the first",
        "opt_flax/attention.py",
        "jnp.tri(T, S, S - T, dtype=bool)",
        "jnp.tri(T, S, dtype=bool)",
        ("tests/flax/test_attention.py",),
    ),
    Breakage(
        "the padding row learns",
        "opt_flax/linear.py",
        "lax.stop_gradient(found), found)",
        "found, found)",
        ("tests/shared/test_losses.py",),
    ),
    Breakage(
        "heads are not split over devices",
        "opt_core/mesh.py",
        '"heads": "model"',
        '"heads": None',
        ("tests/core/test_mesh.py",),
    ),
    Breakage(
        "a gradient's parts count as wholes",
        "opt_torch/distribution.py",
        "* parts / mesh.size()",
        "/ mesh.size()",
        ("tests/torch/test_sharding.py",),
    ),
    Breakage(
        "an axis of the mesh splits two dimensions of one parameter",
        "opt_core/mesh.py",
        "where is not None and where not in parts and divides(",
        "where is not None and divides(",
        ("tests/core/test_mesh.py",),
    ),
    Breakage(
        "a row that begins like another misses the token after that",
        "opt_core/serving/scheduler.py",
        "self.table.held[slot] = count\n",
        "self.table.held[slot] = count + 1\n",
        ("tests/core/serving", "tests/shared/serving"),
    ),
    Breakage(
        "GPTQ's zero points stay less one",
        "opt_core/checkpoints/quantized/gptq.py",
        "(points + np.uint8(1))",
        "(points + np.uint8(0))",
        ("tests/core/checkpoints/test_quantized.py",),
    ),
    Breakage(
        "the shift of a group is made with the scale before it was rounded",
        "opt_torch/int4.py",
        "(_MIDDLE - zeros.float()) * narrow.float()",
        "(_MIDDLE - zeros.float()) * scales.float()",
        ("tests/torch/test_int4.py",),
    ),
)


def is_caught(breakage: Breakage, root: Path) -> tuple[bool, str]:
    """Whether a fast test fails in a copy with this change, and the test's name.

    Args:
        breakage: The change.
        root: A copy of the tree, in which the change is made and taken back.
    """
    path = root / breakage.file
    before = path.read_bytes()
    breakage.apply(root)
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    environment["OPT_BACKENDS"] = breakage.backend or "torch"
    # Nothing of another copy may be found, least of all what was compiled there.
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", *breakage.tests]
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=False
        )
    finally:
        path.write_bytes(before)
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    # 1: a test failed; everything else is no answer.
    if done.returncode not in (0, 1) or (done.returncode == 1 and not lines):
        raise RuntimeError(f"{breakage.name}: pytest ended with {done.returncode}:\n{done.stdout}")
    return done.returncode == 1, lines[0] if lines else ""


def main(words: list[str]) -> int:
    """Tries those that are asked for; returns how many were not caught."""
    chosen = [
        b for b in BREAKAGES if not words or any(word in f"{b.name} {b.file}" for word in words)
    ]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        shutil.copytree(ROOT, root, ignore=LEFT_OUT)
        for number, breakage in enumerate(chosen, 1):
            started = time.perf_counter()
            caught, where = is_caught(breakage, root)
            missed += not caught
            seconds = f"{time.perf_counter() - started:.0f} s"
            print(f"{number}/{len(chosen)} {'caught' if caught else 'MISSED'} {breakage.file}: "
                  f"{breakage.name} ({seconds}) {where[:120]}", flush=True)  # fmt: skip
    print(f"{len(chosen) - missed} of {len(chosen)} caught")
    return missed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
