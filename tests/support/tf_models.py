"""Models of TensorFlow for its own tests, and other processes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import opt_tf
from opt_core import OPTConfig
from tests.support.configs import CONFIGS

ROOT = Path(__file__).parents[2]
QUIET = CONFIGS["pre_ln"].replace(dropout=0.0, num_hidden_layers=1)


def model_of(folder, variant: str | OPTConfig = "pre_ln", **options) -> Any:
    return opt_tf.TFOPTForCausalLM.from_pretrained(folder(variant), **options)


def history_of(model, *data, epochs=3, **options):
    """The history of Keras' fit over some epochs in batches of four."""
    options = {"batch_size": 4, "verbose": 0, "shuffle": False, **options}
    return model.fit(*data, epochs=epochs, **options).history


def python(
    code: str, backend: str | None, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program in another process, in the project's folder."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)} | environment
    environment.pop("KERAS_BACKEND", None)
    if backend is not None:
        environment["KERAS_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
