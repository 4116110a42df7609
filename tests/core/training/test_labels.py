"""Requirements on labels, with shapes that are known only in part among them."""

import numpy as np
import pytest

from opt_core.config import OPTConfig
from opt_core.errors import InputError
from opt_core.training.labels import (
    check_integers,
    check_padding,
    check_values,
    class_count,
    resolve_problem_type,
)


@pytest.mark.parametrize(
    ("given", "count", "dtype", "expected"),
    [
        (None, 1, "int64", "regression"),
        (None, 3, np.dtype("int32"), "single_label_classification"),
        (None, 3, "torch.float32", "multi_label_classification"),
        (None, 3, "bfloat16", "multi_label_classification"),
        ("regression", 3, "int64", "regression"),
        ("multi_label_classification", 1, "int64", "multi_label_classification"),
    ],
)
def test_what_a_classifier_is_trained_for(given, count, dtype, expected):
    config = OPTConfig(num_labels=count, problem_type=given)
    assert resolve_problem_type(config, dtype) == expected


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [
        ("int64", (2, 9), [(2, 9)]),
        ("torch.int32", (2, None), [(None, 9)]),
        ("uint8", (2, 1), [(2,), (2, 1)]),
    ],
)
def test_integers_of_a_shape_that_fits(dtype, shape, expected):
    check_integers("labels", dtype, shape, *expected)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("float32", (2, 9)), ("bool", (2, 9)), ("int64", (2, 8)), ("int64", (9,))]
)
def test_other_labels_are_refused(dtype, shape):
    message = f"labels: expected integers of shape (2, 9), received {dtype} of shape {shape}"
    with pytest.raises(InputError) as caught:
        check_integers("labels", dtype, shape, (2, 9), (None, None, 1))
    assert str(caught.value) == message


def test_as_many_values_as_logits():
    check_values((6,), (2, 3))
    check_values((None, 4), (None, 3))
    with pytest.raises(InputError, match=r"labels: expected \(2, 3\) values, received \(5,\)"):
        check_values((5,), (2, 3))


def test_several_texts_need_a_padding_id():
    check_padding(1, None)
    check_padding(None, 1)
    for rows in (None, 2):
        with pytest.raises(InputError, match="needs pad_token_id"):
            check_padding(None, rows)


def test_classes_of_a_head():
    config = OPTConfig(num_labels=5)
    assert class_count(config, "causal_lm") == config.vocab_size
    assert class_count(config, "sequence_classification") == 5
