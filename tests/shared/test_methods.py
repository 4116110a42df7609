"""Methods and attributes that `transformers` gives its models, on every backend."""

import math
from typing import Any

import numpy as np
import pytest

from opt_core.errors import ConfigError, InputError
from opt_core.params import param_specs
from tests.support.backends import ORACLE_TOLERANCE, Backend
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts, reference, tensors

TIED = CONFIGS["post_ln"].replace(num_hidden_layers=1)
UNTIED = CONFIGS["pre_ln"].replace(num_hidden_layers=1, tie_word_embeddings=False)


def table_of(backend: Backend, model: Any, name: str = "embed_tokens") -> Any:
    import importlib

    checkpoint = importlib.import_module(f"opt_{backend.name}.checkpoint")
    (spec,) = [s for s in param_specs(model.config, model.head) if f"{name}.weight" in s.name]
    return backend.numpy(checkpoint.get_parameter(model, spec))


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_a_resized_vocabulary_is_transformers(backend: Backend, folder, tmp_path, config):
    model, theirs = backend.load(folder(config)), reference(config)
    ids = make_prompts(config, 2, 7)
    old = table_of(backend, model)
    for count in (117, 64):
        layer = model.resize_token_embeddings(count)
        assert layer is model.get_input_embeddings()
        assert model.config.vocab_size == model.model.config.vocab_size == count
        new = table_of(backend, model)
        assert new.shape == (count, config.embed_dim)
        np.testing.assert_array_equal(new[:64], old[:64])
        if count == 117:  # new rows lie about where the mean of the old ones does
            np.testing.assert_array_equal(new[:99], old)
            np.testing.assert_allclose(new[99:], np.tile(old.mean(0), (18, 1)), atol=1e-3)
    theirs.resize_token_embeddings(64)
    ids %= 64
    expected = theirs(**tensors({"input_ids": ids})).logits
    np.testing.assert_allclose(
        backend.run(model, input_ids=ids).logits, expected, rtol=0, atol=ORACLE_TOLERANCE
    )
    model.save_pretrained(tmp_path)
    again = backend.load(tmp_path)
    assert again.config.vocab_size == 64
    np.testing.assert_allclose(
        backend.run(again, input_ids=ids).logits, expected, rtol=0, atol=ORACLE_TOLERANCE
    )
    if backend.name == "torch":  # elsewhere it is compiled for seconds, and is the same code
        assert again.generate(ids, max_new_tokens=2).shape == (2, 9)


def test_sizes_of_a_vocabulary(backend: Backend, folder):
    head = "sequence_classification"
    model = backend.load(folder(TIED, head), head)
    pad = table_of(backend, model)[1].copy()
    model.resize_token_embeddings(100, pad_to_multiple_of=16)
    assert model.config.vocab_size == 112
    model.resize_token_embeddings(pad_to_multiple_of=64, mean_resizing=False)
    assert model.config.vocab_size == 128
    table = table_of(backend, model)
    assert 0.5 < table[112:].std() / model.config.init_std < 2
    np.testing.assert_array_equal(table[1], pad)
    assert model.resize_token_embeddings() is model.get_input_embeddings()
    with pytest.raises(ConfigError, match="pad_token_id=1 is outside the vocabulary"):
        model.resize_token_embeddings(1)
    with pytest.raises(ConfigError, match="new_num_tokens: expected an integer of at least 1"):
        model.resize_token_embeddings(0)
    assert model.config.vocab_size == len(table_of(backend, model)) == 128


def test_parameters_are_counted_as_transformers_does(backend: Backend, folder):
    model, theirs = backend.load(folder(UNTIED)), reference(UNTIED)
    theirs.requires_grad_(True)
    for options in ({}, {"exclude_embeddings": True}, {"only_trainable": True}):
        assert model.num_parameters(**options) == theirs.num_parameters(**options), options
    assert model.get_memory_footprint() >= 4 * model.num_parameters()
    batch = tensors({"input_ids": make_prompts(UNTIED, 3, 8)})
    assert model.estimate_tokens(batch) == 24
    counted = theirs.num_parameters(exclude_embeddings=True)
    assert model.floating_point_ops(batch) == 6 * 24 * counted
    with pytest.raises(InputError, match="estimate_tokens: expected input_ids or inputs_embeds"):
        model.estimate_tokens({})


def test_parts_and_attributes_have_transformers_names(backend: Backend, folder, tmp_path):
    model = backend.load(folder(TIED))
    assert model.base_model is model.model
    assert model.base_model.base_model is model.model
    assert model.base_model_prefix == "model"
    assert type(model).main_input_name == "input_ids"
    assert model.can_generate()
    assert not type(model.model).can_generate()
    assert model.name_or_path == str(folder(TIED))
    assert model.get_decoder() is model.model.decoder
    assert model.get_input_embeddings() is model.get_decoder().embed_tokens
    assert model.model.get_output_embeddings() is None
    assert model.get_output_embeddings() is not None
    assert model.get_position_embeddings() is model.get_decoder().embed_positions
    model.tie_weights()
    assert model.supports_gradient_checkpointing
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    assert model.is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    model.add_model_tags("mine")
    model.add_model_tags(["a", "b"])
    assert model.model_tags == ("mine", "a", "b")
    ids = backend.numpy(model.dummy_inputs["input_ids"])
    assert ids.shape == (3, 5)
    logits = backend.run(model, **model.dummy_inputs).logits
    model.set_attn_implementation("eager")
    assert model.attn_implementation == model.model.attn_implementation == "eager"
    eager = backend.run(model, **model.dummy_inputs).logits
    np.testing.assert_allclose(eager, logits, atol=1e-5)
    with pytest.raises(ConfigError, match=r"attn_implementation: expected one of .* 'fast'"):
        model.set_attn_implementation("fast")
    assert len(repr(model).splitlines()) < 50


def test_embeddings_are_replaced(backend: Backend, folder):
    first, second = (backend.load(folder(UNTIED, seed=seed)) for seed in (0, 1))
    narrow = backend.load(folder(UNTIED.replace(word_embed_proj_dim=24)))
    first.set_input_embeddings(second.get_input_embeddings())
    first.set_output_embeddings(second.get_output_embeddings())
    for name in ("embed_tokens", "lm_head"):
        np.testing.assert_array_equal(
            table_of(backend, first, name), table_of(backend, second, name)
        )
    with pytest.raises(ConfigError, match="embeddings: expected a width of 32, found 24"):
        first.set_output_embeddings(narrow.get_output_embeddings())
    config = UNTIED.replace(tie_word_embeddings=True)
    tied, longer = backend.load(folder(config)), backend.load(folder(config))
    longer.resize_token_embeddings(105)
    tied.set_input_embeddings(longer.get_input_embeddings())
    assert tied.config.vocab_size == 105
    ids = make_prompts(tied.config, 1, 5)
    np.testing.assert_allclose(
        backend.run(tied, input_ids=ids).logits, backend.run(longer, input_ids=ids).logits
    )
    tied.set_output_embeddings(first.get_output_embeddings())
    assert not tied.config.tie_word_embeddings
    hidden = backend.run(tied.model, input_ids=ids).last_hidden_state
    np.testing.assert_allclose(
        backend.run(tied, input_ids=ids).logits, hidden @ table_of(backend, first, "lm_head").T,
        atol=1e-5,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"set_output_embeddings: .* has no head"):
        tied.model.set_output_embeddings(None)


def test_quantised_models_refuse_what_would_change_their_weights(backend: Backend, folder):
    model = backend.load(folder(TIED), quantize="int8")
    with pytest.raises(ConfigError, match="resize_token_embeddings: a model with quantised"):
        model.resize_token_embeddings(120)
    size = model.get_memory_footprint()
    tables = model.num_parameters() - math.prod((514, 32))
    assert tables < size < 4 * model.num_parameters()
