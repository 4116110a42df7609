"""A cold `opt-lm generate` leaves out imports that cost a tenth of its time or more."""

import subprocess
import sys

import pytest

from tests.support.backends import BACKENDS

UNUSED = {
    "torch": {
        *("tensorflow", "jax", "transformers", "sympy"),
        *("torch._dynamo", "torch._inductor", "torch.distributed.tensor", "torch.distributed.fsdp"),
        *("opt_torch.trainer", "opt_torch.export", "opt_torch.serving"),
    },
    "tf": {
        # TensorFlow itself imports JAX where there is one.
        *("torch", "transformers", "tensorboard", "opt_tf.trainer", "opt_tf.serving"),
    },
    "flax": {
        *("torch", "tensorflow", "transformers", "orbax.checkpoint"),
        *("opt_flax.trainer", "opt_flax.export", "opt_flax.training_checkpoints"),
        "opt_flax.serving",
    },
}
"""Backend -> modules."""

PROGRAM = """
import sys
from opt_cli.main import main
try:
    main(["generate", "ROMEO:", "--max-new-tokens", "1", "--backend", sys.argv[1]])
except SystemExit as end:
    assert not end.code, end.code
print("imported:", *(name for name in sys.argv[2].split(",") if name in sys.modules))
"""


@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_imports_nothing_it_does_not_use(backend):
    command = [sys.executable, "-c", PROGRAM, backend, ",".join(sorted(UNUSED[backend]))]
    found = subprocess.run(command, check=False, capture_output=True, text=True)
    assert not found.returncode, found.stderr
    assert found.stdout.splitlines()[-1].split() == ["imported:"]
