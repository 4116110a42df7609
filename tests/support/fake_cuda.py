"""A CUDA device that is not there: PyTorch's fake tensors say what runs where, and compute nothing.

Operations on tensors of different devices are refused as on a real one. What has to wait for the
device (its values are asked for on the host) is counted; the host then sees one number everywhere.
"""

import ctypes
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily

import opt_torch
from opt_core.config import OPTConfig
from opt_core.params import Head, param_specs
from opt_core.quantization import QuantizedTensor, scheme_of
from opt_torch import checkpoint, quantization
from tests.support.backends import CLASSES

DEVICE = torch.device("cuda", 0)
READS = ("item", "tolist", "cpu", "numpy", "__int__", "__float__", "__bool__", "__index__")
"""Methods of a tensor that wait for its device."""
DRAWS = ("exponential_", "normal_", "uniform_")
"""Methods that want a generator of the tensor's device."""


@contextmanager
def fake_cuda(fill: int = 1) -> Iterator[list[str]]:
    """Lets tensors be on `DEVICE`; gives the list of waits for it: where each was asked for.

    Args:
        fill: The number that the host sees.
    """
    waits: list[str] = []
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        numpy = Tensor.numpy
        for name in READS:
            patch.setattr(FakeTensor, name, _reading(name, waits, fill), raising=False)
        patch.setattr(Tensor, "numpy", lambda tensor: _really(numpy, tensor))
        for name in DRAWS:
            patch.setattr(FakeTensor, name, lambda tensor, *_, **__: tensor, raising=False)
        patch.setattr(torch, "Generator", NoGenerator)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        stack.enter_context(_guard())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield waits


def _reading(name: str, waits: list[str], fill: int) -> Any:
    plain = getattr(Tensor, name)

    def read(tensor: Tensor, *args: Any, **options: Any) -> Any:
        caller = traceback.extract_stack(limit=2)[0]
        waits.append(f"{caller.filename.rpartition('/')[2]}:{caller.name}: {caller.line}")
        return _really(
            lambda: plain(torch.full(tensor.shape, fill, dtype=tensor.dtype), *args, **options)
        )

    return read


def _really(function: Any, *args: Any) -> Any:
    """The result of a function on tensors that have values."""
    with unset_fake_temporarily():
        return function(*args)


@contextmanager
def _guard() -> Iterator[None]:
    """Lets C++ make `DEVICE` the current one, as the CPU is made it: by doing nothing.

    A build with CUDA has a way of its own.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).with_name("lib") / "libc10.so"))
    guards = (ctypes.c_void_p * 2).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    before = guards[1]
    guards[1] = before or guards[0]
    try:
        yield
    finally:
        guards[1] = before


class NoGenerator:
    """In the place of a generator on a device, which a build without CUDA cannot make."""

    def __init__(self, device: Any = None):
        self.device = torch.device(device)

    def manual_seed(self, seed: int) -> "NoGenerator":
        """Takes any seed."""
        return self


def fake_model(
    config: OPTConfig, head: Head = "causal_lm", quantize: str | None = None, **options: Any
) -> Any:
    """A model on `DEVICE`, within `fake_cuda`."""
    model = getattr(opt_torch, CLASSES[head])(config, seed=None, **options)
    for spec in param_specs(config, head):
        scheme = scheme_of(spec, quantize)
        if scheme is None:
            checkpoint.set_parameter(model, spec, torch.empty(spec.shape, device=DEVICE))
        else:
            numbers = QuantizedTensor.empty(spec.shape, scheme)
            quantization.set_quantized(model, spec, numbers, torch.float32, DEVICE)
    checkpoint.tie(model)
    return model.requires_grad_(quantize is None).eval()
