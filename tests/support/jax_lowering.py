"""Programs of JAX that are lowered in one context of MLIR instead of one each.

Loading all dialects into a new one takes a fifth of the time of compiling an operation, and tests
compile thousands of them. JAX does not document the name: where it is missing, nothing happens.
"""

from functools import lru_cache

from jax._src.interpreters import mlir

if hasattr(mlir, "make_ir_context"):
    mlir.make_ir_context = lru_cache(maxsize=None)(mlir.make_ir_context)
