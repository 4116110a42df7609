"""KerasHub's preprocessor: rows of one length, labels, and texts again."""

import json

import numpy as np
import pytest

from opt_core.compatibility.keras_hub_preprocessor import OPTCausalLMPreprocessor
from opt_core.errors import InputError, TokenizerError
from opt_core.text.tokenizer import OPTTokenizer

TEXTS = ["What say you?", "No."]


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained("mini")


def test_inputs_labels_and_weights(tokenizer):
    start, end, pad = tokenizer.start_token_id, tokenizer.end_token_id, tokenizer.pad_token_id
    rows = [[start, *tokenizer(text, add_special_tokens=False).input_ids, end] for text in TEXTS]
    length = max(map(len, rows)) + 2
    whole = np.array([row + [pad] * (length + 1 - len(row)) for row in rows])
    made = OPTCausalLMPreprocessor(tokenizer, sequence_length=length)
    for given in (TEXTS, tuple(TEXTS), np.array(TEXTS)):
        inputs, labels, weights = made(given)
        np.testing.assert_array_equal(inputs["token_ids"], whole[:, :-1])
        np.testing.assert_array_equal(labels, whole[:, 1:])
        np.testing.assert_array_equal(inputs["padding_mask"].sum(1), [len(row) for row in rows])
        np.testing.assert_array_equal(weights.sum(1), [len(row) - 1 for row in rows])
    inputs, *_ = made(TEXTS[0], add_start_token=False, add_end_token=False, sequence_length=2)
    assert inputs["token_ids"].tolist() == rows[0][1:3]
    cut, labels, _ = made(TEXTS[0], sequence_length=3)
    assert cut["token_ids"].tolist() == rows[0][:3]
    assert labels[-1] == end
    with pytest.raises(InputError, match="x: expected a text or texts, received int"):
        made(3)


def test_prompts_and_texts_again(tokenizer):
    made = OPTCausalLMPreprocessor(tokenizer, sequence_length=12)
    prompts = made.generate_preprocess(TEXTS)
    assert (
        tokenizer.end_token_id not in prompts["token_ids"][0][1 : prompts["padding_mask"][0].sum()]
    )
    assert made.generate_postprocess(prompts) == TEXTS
    assert made.generate_postprocess(made.generate_preprocess(TEXTS[1])) == TEXTS[1]
    settings = {"sequence_length": 12, "add_start_token": True, "add_end_token": True}
    assert made.get_config() == {"tokenizer": tokenizer.get_config()} | settings
    assert tokenizer.detokenize(tokenizer(TEXTS, add_special_tokens=False)) == TEXTS


def test_assets_are_read_again(tokenizer, tmp_path):
    tokenizer.save_assets(tmp_path)
    again = OPTTokenizer(vocabulary=tmp_path / "vocabulary.json", merges=tmp_path / "merges.txt")
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids


def test_configurations_hold_the_vocabulary(tokenizer):
    given = OPTTokenizer.from_pretrained("mini", add_bos_token=False, padding_side="left")
    given.add_tokens(["<new>"])
    given.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    again = OPTTokenizer.from_config(json.loads(json.dumps(given.get_config())))
    text = "What <new> say<extra>"
    assert again(text) == given(text)
    assert again.get_config() == given.get_config()
    assert (again.padding_side, again.add_bos_token) == ("left", False)
    assert (again.start_token, again.end_token) == (given.bos_token, given.eos_token)
    made = OPTCausalLMPreprocessor(tokenizer, sequence_length=5)
    assert OPTCausalLMPreprocessor(tokenizer, name="mine", dtype="float32").name == "mine"
    with pytest.raises(InputError, match="length: no argument of a preprocessor"):
        OPTCausalLMPreprocessor(tokenizer, length=5)
    copied = OPTCausalLMPreprocessor.from_config(made.get_config())
    np.testing.assert_array_equal(copied(TEXTS)[1], made(TEXTS)[1])
    with pytest.raises(TokenizerError, match="from_config: this configuration has no vocabulary"):
        OPTTokenizer.from_config({"add_prefix_space": False})
