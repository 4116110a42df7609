"""PyTorch's compiler."""

import pytest

pytest.importorskip("torch")

import torch

from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.torch_models import model_of


def test_compiles_without_a_graph_break(folder):
    """`torch.compile` users get one graph per shape."""
    model, ids = model_of(folder), torch.tensor(make_prompts(CONFIGS["pre_ln"], 1, 4))
    explanation = torch._dynamo.explain(lambda x: model(x).logits)(ids)
    assert explanation.graph_count == 1
    assert explanation.graph_break_count == 0
