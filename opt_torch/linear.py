"""Linear layers in the layout that is fast: oneDNN's on the CPU, wherever no gradient is wanted.

PyTorch computes float32 products on the CPU with MKL, which reads the weights of small ones at half
to three quarters of the rate oneDNN reaches. A batch of products with parts of the weight is faster
than either: MKL gives each part to one core, and a call of oneDNN takes 40 microseconds before it
begins, where this takes 3. With AVX2 that holds for any number of rows, wide inputs (out <= in) of
256 rows and more aside, where a whole product of MKL's is the best; with wider instructions it is
known of single rows only, and MKL is the best for 256 rows and more, but not on AMD's processors.
For bfloat16 oneDNN is nearly twice as fast once the weights are in its
own blocked order. That is a second copy: it is made where memory allows, used while a model
generates, kept for the next time, and checked against the parameters before every use. The
parameters themselves are never touched. Float32 has the same for several rows, where a batch is
served: 16 rows take three quarters of the time, 256 nine tenths.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opt_core.machine import available_memory, maker
from opt_torch import _private

WORTHWHILE = 32
"""Tokens to generate from which on packing is done; it costs what about 16 tokens save."""

MANY_ROWS = 256
"""From so many rows on MKL's float32 product with a whole weight is faster than oneDNN's; where
`_is_mkl_slow`, it is 6 to 30 % slower even for 2048."""

_PARTS = 8
"""Parts of a weight that float32 rows are multiplied with, at least one per thread."""
_COLUMNS = 4096
"""Columns of a result that are computed at once, for several rows: they stay in the cache."""

BLOCK = 2**19
"""Numbers of a bfloat16 weight that are upcast at once."""


_PACKED: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""Weights in oneDNN's order, while models generate (`packed`)."""
_KEPT: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()
"""The last packed weight of a layer and the fingerprint of what was packed; training drops it."""


def apply_linear(layer: nn.Module, input: Tensor) -> Tensor:
    """A layer's output, computed by oneDNN on the CPU where no gradient is wanted.

    Models hold PyTorch's own `torch.nn.Linear`, which programs look for by its very type to prune,
    quantise or replace it: hence what is fast is here, where layers are called. Layers of another
    type, or with hooks or a `forward` of their own, are called.

    Args:
        layer: The layer.
        input: (..., I).
    """
    is_traced = torch.compiler.is_compiling()
    if is_traced or type(layer) is not nn.Linear or has_custom_call(layer):
        return layer(input)
    return multiply(input, layer.weight, layer.bias, _PACKED.get(layer))


def make_linear(layer: nn.Linear) -> Callable[[Tensor], Tensor]:
    """A function that computes what `multiply` does for rows (R, I), the way of it settled.

    It holds as long as nothing about the layer changes, under `torch.no_grad`.
    """
    weight, bias, order = layer.weight, layer.bias, _PACKED.get(layer)
    is_slow = weight.dtype == torch.bfloat16 and not _has_bfloat16()
    if _private.mkldnn_linear is None or not _is_cpu_type(weight) or is_slow:
        return lambda input: multiply(input, layer.weight, bias)
    if weight.dtype == torch.float32:
        choose = cache(partial(_make_float32_linear, weight, bias, order))
        return lambda input: choose(len(input))(input)
    return _bind_mkldnn(weight if order is None else order, bias)


def multiply(
    input: Tensor, weight: Tensor, bias: Tensor | None, packed: Tensor | None = None
) -> Tensor:
    """`input @ weight.T + bias`, the fastest way known.

    Args:
        input: (..., I).
        weight: (O, I).
        bias: (O,), or None.
        packed: The weight in oneDNN's order, to be taken where that is of use.
    """
    if _private.mkldnn_linear is None or not _is_plain(input, weight):
        return F.linear(input, weight, bias)
    if weight.dtype == torch.float32:
        return _make_float32_linear(weight, bias, packed, input.shape[:-1].numel())(input)
    if weight.dtype == torch.bfloat16 and not _has_bfloat16():
        return upcast_linear(input, weight, bias)
    weight = weight if packed is None else packed
    return _private.mkldnn_linear(input, weight, bias, "none", [], "")


def upcast_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A bfloat16 product on a CPU that has no instructions for it, computed in float32.

    A single row goes to PyTorch's own kernel, which reads the weights at memory's rate. For more it
    takes a hundred times as long as a float32 product, hence the weight is upcast, a block that
    stays in the cache at a time.
    """
    if input.shape[:-1].numel() == 1:
        return F.linear(input, weight, bias)
    out = input.new_empty(*input.shape[:-1], len(weight))
    wide, rows = input.float(), max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        part_bias = None if bias is None else bias[part].float()
        out[..., part] = F.linear(wide, weight[part].float(), part_bias)
    return out


@contextmanager
def packed(model: nn.Module, new_tokens: int) -> Iterator[None]:
    """Keeps a model's bfloat16 weights in oneDNN's order for the length of a generation.

    Nothing happens where that is of no use: in other types, for a few tokens, or as `pack` says.

    Args:
        model: The model; its weights must not change meanwhile.
        new_tokens: Tokens to generate.
    """
    is_useful = new_tokens >= WORTHWHILE
    with using(pack(model, (torch.bfloat16,)) if is_useful else {}):
        yield


def pack(model: nn.Module, dtypes: Collection[torch.dtype]) -> dict[nn.Module, Tensor]:
    """A model's weights in oneDNN's order: those kept from before, if the weights are the same.

    Args:
        model: The model.
        dtypes: Types in which that is of use.

    Returns:
        They, by layer. None on other devices, in other types or several, where the CPU has no
        instructions for the type, or where copies would take more than half of the memory there is.
    """
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    size = sum(layer.weight.nbytes for layer in layers if layer not in _KEPT)
    useful = (
        _private.mkldnn_reorder is not None
        and len({layer.weight.dtype for layer in layers}) == 1
        and all(m.weight.dtype in dtypes and _is_cpu_type(m.weight) for m in layers)
        and (layers[0].weight.dtype != torch.bfloat16 or _has_bfloat16())
        and size <= available_memory() / 2
    )
    return {layer: _pack(layer) for layer in layers} if useful else {}


@contextmanager
def using(orders: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Multiplies with weights that `pack` found, which must be those of the layers still."""
    _PACKED.update(orders)
    try:
        yield
    finally:
        for layer in orders:
            _PACKED.pop(layer, None)


def forget_packed(model: nn.Module) -> None:
    """Drops a model's packed weights: they are about to change, or to move."""
    for layer in model.modules():
        _KEPT.pop(layer, None)


def _pack(layer: nn.Linear) -> Tensor:
    """A packed weight: the one from before, if the weight is the same."""
    weight = layer.weight.detach()
    mark, kept = fingerprint(weight), _KEPT.get(layer)
    if kept is None or not torch.equal(kept[1], mark):
        kept = _KEPT[layer] = _private.mkldnn_reorder(weight), mark
    return kept[0]


def fingerprint(weight: Tensor) -> Tensor:
    """The sums of a weight's rows, as integers: they change with any change worth the name.

    It costs about as much as reading the weights for one token. PyTorch's own version counter
    would be free, but it misses what is written through `.data`.
    """
    word = torch.int64 if weight.shape[1] % 4 == 0 else torch.int16
    return weight.contiguous().view(word).sum(1, dtype=torch.int64)


def is_eager(input: Tensor) -> bool:
    """Whether a product is only that: no gradient, no transform, no autocast."""
    return not (
        (input.requires_grad and torch.is_grad_enabled())
        or torch.compiler.is_compiling()
        or _private.is_jit_tracing()
        or torch.is_autocast_enabled("cpu")
        or _private.in_transform()
        or input.numel() == 0
    )


def has_custom_call(module: nn.Module) -> bool:
    """Whether calling a module may do something beside its class' `forward`."""
    return "forward" in vars(module) or _private.has_hooks(module)


def _make_float32_linear(
    weight: Tensor, bias: Tensor | None, order: Tensor | None, rows: int
) -> Callable[[Tensor], Tensor]:
    """A function that multiplies so many float32 rows (..., I), the fastest way known."""
    (out, width), threads = weight.shape, torch.get_num_threads()
    parts, is_many = -(-_PARTS // threads) * threads, rows >= MANY_ROWS
    has_parts = out % parts == 0 and weight.is_contiguous() and torch.backends.mkl.is_available()
    if has_parts and rows == 1:
        return _make_row_linear(weight, bias, parts)
    if order is not None and rows > 1:
        return _bind_mkldnn(order, bias)
    if has_parts and _has_avx2_only() and not (is_many and out <= width):
        return _make_rows_linear(weight, bias, parts)
    if is_many and not _is_mkl_slow():
        return lambda input: F.linear(input, weight, bias)
    return _bind_mkldnn(weight, bias)


def _make_row_linear(weight: Tensor, bias: Tensor | None, parts: int) -> Callable[[Tensor], Tensor]:
    """A function that multiplies a single row with a weight, part by part."""
    out, width = weight.shape
    columns = weight.view(parts, out // parts, width).transpose(1, 2)
    shifts = None if bias is None else bias.view(parts, 1, -1)

    def multiply(input: Tensor) -> Tensor:
        row = input.reshape(1, 1, width).expand(parts, 1, width)
        each = row.bmm(columns) if shifts is None else torch.baddbmm(shifts, row, columns)
        return each.view(*input.shape[:-1], out)

    return multiply


def _make_rows_linear(
    weight: Tensor, bias: Tensor | None, parts: int
) -> Callable[[Tensor], Tensor]:
    """A function that multiplies any number of rows with a weight, part by part."""
    out, width = weight.shape
    step = max(_COLUMNS // parts, 1) * parts
    pieces = [
        (
            weight[start : start + step].view(parts, -1, width).transpose(1, 2),
            None if bias is None else bias[start : start + step].view(parts, 1, -1),
        )
        for start in range(0, out, step)
    ]

    def multiply(input: Tensor) -> Tensor:
        rows = input.reshape(1, -1, width)
        rows = rows.expand(parts, *rows.shape[1:])
        result = input.new_empty(rows.shape[1], out)
        for (columns, shifts), part in zip(pieces, result.split(step, 1), strict=True):
            each = rows.bmm(columns) if shifts is None else torch.baddbmm(shifts, rows, columns)
            part.unflatten(1, (parts, -1)).copy_(each.transpose(0, 1))
        return result.view(*input.shape[:-1], out)

    return multiply


def _bind_mkldnn(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    call = _private.mkldnn_linear.default
    return lambda input: call(input, weight, bias, "none", [], "")


def _is_plain(input: Tensor, weight: Tensor) -> bool:
    """Whether a product may be oneDNN's: only that, and types that agree."""
    return (
        not torch.is_grad_enabled()
        and is_eager(input)
        and input.dtype == weight.dtype
        and input.device == weight.device
        and _is_cpu_type(weight)
    )


def _is_cpu_type(weight: Tensor) -> bool:
    if type(weight) not in (Tensor, nn.Parameter):  # such as a part of one, on a mesh
        return False
    if weight.device.type != "cpu" or weight.layout != torch.strided:
        return False
    return weight.dtype in (torch.float32, torch.bfloat16)


def product_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type in which a CPU multiplies many rows: one that it has instructions for."""
    is_slow = dtype == torch.float16 or (dtype == torch.bfloat16 and not _has_bfloat16())
    return torch.float32 if is_slow else dtype


@cache
def _has_bfloat16() -> bool:
    return _private.has_mkldnn_bfloat16()


@cache
def _has_avx2_only() -> bool:
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


@cache
def _is_mkl_slow() -> bool:
    """Whether MKL leaves the widest instructions unused, as it does on AMD's processors."""
    return maker() == "AuthenticAMD" and not _has_avx2_only()
