"""The tree of modules: parameters, names, copies."""

import copy
import pickle

import pytest

pytest.importorskip("torch")

import torch

import opt_torch
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts
from tests.support.torch_models import model_of


def test_tied_weights_are_one_parameter(folder):
    tied, untied = (
        model_of(folder),
        model_of(folder, CONFIGS["pre_ln"].replace(tie_word_embeddings=False)),
    )
    assert tied.lm_head.weight is tied.get_decoder().embed_tokens.weight
    assert untied.num_parameters() - tied.num_parameters() == 99 * 32


def test_the_module_tree_is_the_one_transformers_has(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.OPTForCausalLM.from_pretrained(folder("post_ln"), dtype="float32")
    assert set(model_of(folder, "post_ln").state_dict()) == set(theirs.state_dict())


LONG = {"max_new_tokens": 40, "eos_token_id": None}


@pytest.mark.parametrize("variant", [*CONFIGS, "gelu_new"])
def test_models_can_be_copied_and_pickled(folder, variant):

    config = CONFIGS.get(variant) or CONFIGS["pre_ln"].replace(activation_function=variant)
    model, ids = model_of(folder, config), make_prompts(config, 2, 5)
    twins: list[opt_torch.OPTForCausalLM] = [
        copy.deepcopy(model), pickle.loads(pickle.dumps(model)),
    ]  # fmt: skip
    if variant == "pre_ln":
        half = model_of(folder, dtype="bfloat16")
        half.generate(ids, **LONG)
        assert torch.equal(copy.deepcopy(half).generate(ids, **LONG), half.generate(ids, **LONG))
    for twin in twins:
        assert torch.equal(twin(ids).logits, model(ids).logits)
        assert twin.lm_head.weight is twin.get_decoder().embed_tokens.weight
