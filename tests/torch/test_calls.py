"""PyTorch's own side of code written for `transformers`: its caches, compilers, autograd."""

import copy
import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from torch.utils import _pytree as pytree

from opt_core.errors import InputError
from tests.support import oracle
from tests.support.backends import ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.torch_models import model_of

CONFIG = CONFIGS["pre_ln"]
IDS = torch.tensor(make_prompts(CONFIG, 2, 9))


@pytest.fixture(scope="module")
def right():
    return oracle.forward(oracle.random_params(CONFIG), CONFIG, IDS.numpy()).logits


@pytest.fixture(scope="module")
def model(folder):
    return model_of(folder)


def close(ours, theirs):
    np.testing.assert_allclose(ours.detach(), theirs, rtol=0, atol=ORACLE_TOLERANCE)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_dynamic_cache_is_filled_as_its_owner_holds_it(model, right, mode):
    cache = pytest.importorskip("transformers").DynamicCache()
    with mode():
        for start, end in ((0, 4), (4, 5), (5, 9)):
            out = model(IDS[:, start:end], past_key_values=cache)
            assert out.past_key_values is cache
            assert cache.get_seq_length() == end
            close(out.logits, right[:, start:end])
        with pytest.raises(InputError, match="holds 2 rows, the input has 1"):
            model(IDS[:1, :1], past_key_values=cache)


def test_a_static_cache_is_refused(model):
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(**CONFIG.to_dict() | {"dropout": 0})
    cache = transformers.StaticCache(config=config, max_cache_len=9)
    with pytest.raises(InputError, match="expected a DynamicCache or one of init_cache, received"):
        model(IDS, past_key_values=cache)


def test_gradients_go_through_a_cache_that_grows(model, right):
    """Each call has buffers of its own then: none is changed that a gradient needs."""
    model.zero_grad()
    whole = model(IDS, labels=IDS, use_cache=False).logits[:, 4:].sum()
    (expected,) = torch.autograd.grad(
        whole, [model.model.decoder.layers[0].self_attn.k_proj.weight]
    )
    first = model(IDS[:, :4])
    second = model(IDS[:, 4:5], past_key_values=first.past_key_values)
    third = model(IDS[:, 5:], past_key_values=second.past_key_values)
    parts = second.logits.sum() + third.logits.sum()
    (found,) = torch.autograd.grad(parts, [model.model.decoder.layers[0].self_attn.k_proj.weight])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_cache_that_grows_is_continued_once_or_copied(model, right):
    with torch.inference_mode():
        first = model(IDS[:, :4]).past_key_values
        twin = copy.deepcopy(first)
        model(IDS[:, 4:5], past_key_values=first)
        with pytest.raises(InputError, match=r"continued already \(it holds 4 tokens, .* 5\)"):
            model(IDS[:, 5:6], past_key_values=first)
        close(model(IDS[:, 4:], past_key_values=twin).logits, right[:, 4:])
    with torch.no_grad():  # what inference mode made is read-only here
        third = model(IDS[:, 4:6], past_key_values=copy.deepcopy(twin.crop(4)))
        close(third.logits, right[:, 4:6])


def test_training_makes_no_cache_unless_asked(folder):
    model = model_of(folder).train()
    assert model(IDS).past_key_values is None
    assert model(IDS, use_cache=True).past_key_values.length == 9
    model.gradient_checkpointing_enable()
    assert model(IDS, use_cache=True).past_key_values is None


def test_a_cache_of_autocast_goes_on_within_it(model, right):
    with torch.no_grad(), torch.autocast("cpu"):
        first = model(IDS[:, :4])
        second = model(IDS[:, 4:], past_key_values=first.past_key_values)
    np.testing.assert_allclose(second.logits.float(), right[:, 4:], rtol=0, atol=0.1)


def test_the_loop_compiles_as_one_graph(model, right):
    step = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        first = step(IDS[:, :4])
        close(first.logits, right[:, :4])
        close(step(IDS[:, 4:], past_key_values=first.past_key_values).logits, right[:, 4:])


def test_a_program_compiles_where_transformers_is_imported(model, right, monkeypatch):
    """Dynamo takes an object's `__class__` for its type, which outputs have another one of."""
    stand_in: Any = ModuleType("transformers.utils.generic")
    stand_in.ModelOutput = type("ModelOutput", (), {"__init__": None})
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.delitem(sys.modules, "transformers.modeling_outputs", raising=False)
    with torch.no_grad():
        out: Any = torch.compile(model, fullgraph=True, backend="eager")(IDS)
    close(out.logits, right)
    assert isinstance(out, stand_in.ModelOutput)


def test_the_forward_pass_is_traced(model, right):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and tells of every shape it settles
        traced: Any = torch.jit.trace(model, IDS, strict=False)
        close(traced(IDS)["logits"], right)


def test_outputs_are_pytrees(model):
    out = model(IDS, labels=IDS, use_cache=False)
    shapes = pytree.tree_map(lambda tensor: tuple(tensor.shape), out)
    assert type(shapes) is type(out)
    assert shapes == {"loss": (), "logits": (2, 9, 99)}
    exported = torch.export.export(model, (IDS,), strict=False)
    assert type(exported.module()(IDS)) is type(out)
