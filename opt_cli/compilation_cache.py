"""Compiled programs kept on disk, so that a second process does not compile them again."""

import contextlib
import hashlib
import os
from importlib import metadata
from pathlib import Path

from opt_core.machine import instructions

LIMIT = 1 << 30
"""Bytes of JAX's programs that are kept: those used last."""


def keep_programs() -> None:
    """Has JAX and TensorFlow, when they are loaded, keep what XLA compiles for the CPU.

    In `opt-lm/programs` of the user's cache folder (XDG_CACHE_HOME, else ~/.cache), apart for each
    kind of processor and, for TensorFlow, which does not tell them apart, each version. What the
    environment says already (JAX_COMPILATION_CACHE_DIR, TF_XLA_FLAGS) stays.
    """
    folder = programs_folder()
    with contextlib.suppress(OSError, metadata.PackageNotFoundError):
        version = metadata.version("tensorflow")
        kept = folder / f"tensorflow-{version}"
        kept.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("TF_XLA_FLAGS", f"--tf_xla_persistent_cache_directory={kept}")
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "jax")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(LIMIT))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")


def programs_folder() -> Path:
    """Where programs for this processor are."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kind = hashlib.sha256(instructions().encode()).hexdigest()[:12]
    return Path(cache, "opt-lm", "programs", kind)
