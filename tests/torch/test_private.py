"""Undocumented names of PyTorch: they are there, and where one is not, results are the same."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import opt_torch  # noqa: E402
from opt_torch import _private, linear  # noqa: E402
from opt_torch.generation import fast_decode  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_prompts  # noqa: E402

OPERATIONS = (
    *("mkldnn_linear", "mkldnn_reorder", "_has_bfloat16", "_transforms_active"),
    *("quantize_per_channel", "int8_prepack", "int8_unpack", "int8_linear"),
    *("int4_pack", "int4_linear"),
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def test_every_name_is_in_the_installed_version():
    assert [name for name in OPERATIONS if getattr(_private, name) is None] == []
    module = torch.nn.Linear(1, 1)
    assert all(hasattr(module, name) for name in (*HOOKS, "_apply", "_buffers"))
    assert not torch.nn.modules.module._has_any_global_hook()
    assert torch.autograd.forward_ad._current_level == -1
    assert _private.overload(_private.mkldnn_linear) is _private.mkldnn_linear.default._op
    assert not _private.in_transform()
    assert not _private.has_hooks(module)
    module.register_forward_hook(lambda *_: None)
    assert _private.has_hooks(module)


@pytest.fixture
def without(monkeypatch):
    """Takes one name away, as a version of PyTorch that lacks it would."""

    def take(name: str) -> None:
        linear._has_bfloat16.cache_clear()
        if name in OPERATIONS:
            monkeypatch.setattr(_private, name, None)
        elif name == "_op":
            monkeypatch.setattr(_private, "overload", lambda operation: operation.default)
        elif name == "_current_level":
            monkeypatch.delattr(torch.autograd.forward_ad, name)
            # The context that PyTorch's own code needs it in is not entered here.
        else:
            monkeypatch.setattr(_private, "nn", _NoHooks(name))

    yield take
    linear._has_bfloat16.cache_clear()


class _NoHooks:
    """`torch.nn` as `_private` sees it, without the question about global hooks."""

    def __init__(self, name):
        assert name == "_has_any_global_hook"
        self.modules = self.module = object()


ALL = (*OPERATIONS, "_op", "_current_level", "_has_any_global_hook")


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_without_a_name_the_model_computes_the_same(folder, without, name, quantize):
    ids = make_prompts(CONFIGS["pre_ln"], 2, 5)
    settings = {"max_new_tokens": 8, "eos_token_id": None}

    def results():
        model = opt_torch.OPTForCausalLM.from_pretrained(folder("pre_ln"), quantize=quantize)
        with torch.no_grad():
            return model(ids).logits.numpy(), model.generate(ids, **settings).numpy()

    logits, tokens = results()
    without(name)
    found, again = results()
    # The kernels round their input to 7 or 8 bits; what takes their place does not.
    tolerance = 0.1 if quantize and name in (*OPERATIONS, "_current_level") else 2e-5
    np.testing.assert_allclose(found, logits, atol=tolerance * np.abs(logits).max())
    if not quantize:
        np.testing.assert_array_equal(again, tokens)
    assert again.shape == tokens.shape


@pytest.mark.parametrize("name", ["mkldnn_linear", "mkldnn_reorder", "_has_bfloat16"])
def test_a_build_without_onednn_computes_in_bfloat16(folder, without, name):
    """Packing and single steps ask what oneDNN can do only where there is one."""
    ids = make_prompts(CONFIGS["pre_ln"], 2, 5)
    without(name)
    model = opt_torch.OPTForCausalLM.from_pretrained(folder("pre_ln"), dtype="bfloat16")
    tokens = model.generate(ids, max_new_tokens=40, eos_token_id=None)
    assert tokens.shape == (2, 45)
    layer = torch.nn.Linear(8, 16).to(torch.bfloat16)
    rows = torch.randn(3, 8, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = torch.nn.functional.linear(rows.double(), layer.weight.double())
        expected = expected + layer.bias.double()
        for found in (linear.apply_linear(layer, rows), linear.make_linear(layer)(rows)):
            torch.testing.assert_close(found.double(), expected, rtol=2**-7, atol=2**-7)


def test_unknown_hooks_leave_a_model_to_its_modules(folder, without):
    model = opt_torch.OPTForCausalLM.from_pretrained(folder("pre_ln"))
    with torch.no_grad():
        assert fast_decode.make_step(model) is not None
        without("_has_any_global_hook")
        assert fast_decode.make_step(model) is None
