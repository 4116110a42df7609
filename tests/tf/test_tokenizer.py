"""The tokenizer inside tf.data, and its tensors."""

from typing import Any

import pytest
import tensorflow as tf

from opt_core.errors import TokenizerError
from opt_core.text.tokenizer import OPTTokenizer

TEXTS = ["ROMEO:", "What say you, ünï?"]


@pytest.fixture(scope="module")
def tokenizer() -> OPTTokenizer:
    return OPTTokenizer.from_pretrained("mini")


def test_it_is_mapped_over_strings(tokenizer):
    rows = list(tf.data.Dataset.from_tensor_slices(TEXTS).map(tokenizer))
    assert [row["input_ids"].numpy().tolist() for row in rows] == tokenizer(TEXTS).input_ids
    batches = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2).map(tokenizer)
    spec: Any = batches.element_spec
    assert spec["input_ids"].shape.as_list() == [None, None]
    (batch,) = batches
    expected = tokenizer(TEXTS, padding=True)
    assert {k: v.numpy().tolist() for k, v in batch.items()} == dict(expected)
    whole = {"padding": "max_length", "max_length": 40, "truncation": True}
    (batch,) = (
        tf.data.Dataset.from_tensor_slices(TEXTS)
        .batch(2)
        .map(lambda texts: tokenizer(texts, **whole))
    )
    assert batch["input_ids"].numpy().tolist() == tokenizer(TEXTS, **whole).input_ids
    with pytest.raises(TokenizerError, match="expected one string or a vector of them"):
        tf.data.Dataset.from_tensor_slices([[1, 2]]).map(tokenizer)


def test_tensors(tokenizer):
    made = tokenizer(tf.constant(TEXTS), padding=True, return_tensors="tf")
    assert made.input_ids.dtype == tf.int32
    assert made.input_ids.numpy().tolist() == tokenizer(TEXTS, padding=True).input_ids
    assert tokenizer(tf.constant(TEXTS[0])).input_ids == tokenizer(TEXTS[0]).input_ids
    assert tokenizer.batch_decode(made.input_ids, skip_special_tokens=True) == TEXTS
    padded = tokenizer.pad({"input_ids": made.input_ids}).input_ids
    assert tf.is_tensor(padded)
    assert padded.numpy().tolist() == made.input_ids.numpy().tolist()
