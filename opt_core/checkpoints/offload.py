"""Models that stay in their files: when that is done, which weights, and in which order.

What is large stays: the layers' linear weights, the token embedding and the language-model head,
in the type of the file. A computation of a wider type widens one weight at a time. The rest
(positions, norms, biases, projections around the layers, small heads) is read as always.
"""

from typing import Any

from opt_core.checkpoints.plan import LoadPlan
from opt_core.checkpoints.read_ahead import ReadAhead
from opt_core.checkpoints.tensors import LazyTensor, StoredTensor, float_dtype
from opt_core.compatibility.notices import notice
from opt_core.errors import ConfigError
from opt_core.params import ParamSpec

_FULL = 0.9
"""Share of the available memory that weights may take where they are read as always."""
_SPARE = 0.85
"""Share of it that weights may stay in where they are not: a cache of keys grows beside them."""
_AT_ONCE = 2
"""Parts that are in memory while one is computed: it, and the next that is read."""
_WIDER = {
    "float16": ("float16", "float32", "float64"),
    "bfloat16": ("bfloat16", "float32", "float64"),
    "float32": ("float32", "float64"),
    "float64": ("float64",),
}


def stays_in_file(spec: ParamSpec) -> bool:
    """Whether a parameter is one of the large ones."""
    return spec.axes == ("vocab", "embed") or (".layers." in spec.name and len(spec.shape) == 2)


def must_offload(
    offload: Any, plan: LoadPlan, dtype: str, obstacle: str | None, available: float
) -> bool:
    """Whether a model is to stay in its files.

    Args:
        offload: What the caller asked for: True, False, or "auto" for True where the weights do not
            fit into memory and can stay.
        plan: The checkpoint.
        dtype: Type to compute in.
        obstacle: What the backend has against it, such as "expected device='cpu', received 'cuda'".
        available: Bytes of memory that can be had.

    Raises:
        ConfigError: Another value, or it is asked for and cannot be; the reason is named.
    """
    if offload not in (True, False, "auto"):
        raise ConfigError(f"offload: expected True, False or 'auto', received {offload!r}")
    if offload is False:
        return False
    obstacle = obstacle or _obstacle(plan, dtype)
    if offload is True:
        if obstacle is not None:
            raise ConfigError(f"offload: {obstacle}")
        return True
    needed = sum(spec.size for spec, _ in plan.entries) * float_dtype(dtype).itemsize
    if obstacle is not None or needed <= _FULL * available:
        return False
    notice(
        f"offload: {needed / 2**30:.1f} GiB of {dtype} weights do not fit into "
        f"{available / 2**30:.1f} GiB of free memory; each layer is read from its file when its "
        "turn comes"
    )
    return True


def _obstacle(plan: LoadPlan, dtype: str) -> str | None:
    for spec, tensor in plan.entries:
        if not stays_in_file(spec):
            continue
        if not is_viewable(tensor):
            return (
                f"{tensor.file}: {spec.name} is not in the file as it is computed with; make a "
                "copy of the model with opt-lm convert"
            )
        if dtype not in _WIDER[tensor.dtype.name]:
            expected = " or ".join(repr(name) for name in _WIDER[tensor.dtype.name])
            return f"expected dtype {expected} for {tensor.dtype.name} weights, received {dtype!r}"
    return None


def is_viewable(tensor: LazyTensor) -> bool:
    """Whether reading a tensor copies nothing."""
    return isinstance(tensor, StoredTensor) and tensor.offset % tensor.dtype.itemsize == 0


def make_read_ahead(plan: LoadPlan, dtype: str, is_headed: bool, available: float) -> ReadAhead:
    """Makes what reads a model's layers ahead: its parts are the layers, then the head.

    Args:
        plan: A checkpoint of which `must_offload` said True.
        dtype: Type to compute in.
        is_headed: Whether there is a language-model head.
        available: Bytes of memory that can be had.
    """
    parts: list[list[StoredTensor]] = [[] for _ in range(plan.config.num_hidden_layers + is_headed)]
    large = [(s, t) for s, t in plan.entries if stays_in_file(s) and isinstance(t, StoredTensor)]
    tables = [tensor for spec, tensor in large if ".layers." not in spec.name]
    for spec, tensor in large:
        if ".layers." in spec.name:
            layer = spec.name.partition(".layers.")[2].partition(".")[0]
            parts[int(layer)].append(tensor)
    if is_headed:
        parts[-1].append(tables[-1])  # the embedding, if there is no other
    tables[0].source.expect_single_rows(tables[0].offset, tables[0].offset + tables[0].extent)
    widest = max(spec.size for spec, _ in large) * float_dtype(dtype).itemsize
    largest = max(sum(tensor.nbytes for tensor in part) for part in parts)
    return ReadAhead(parts, _SPARE * available - widest - _AT_ONCE * largest)
