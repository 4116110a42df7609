"""Keras' backend and version, and how variables are named."""

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import tensorflow as tf

from opt_core import TrainConfig
from opt_core.dialects import KERAS
from opt_core.params import param_specs
from opt_tf import linear, training
from opt_tf.checkpoint import locate
from tests.support.configs import CONFIGS
from tests.support.tf_models import model_of, python
from tests.support.tiers import tiered

PRODUCT_ERROR = 1e-5  # of sums of 32 products of normal numbers, in float32

IMPORTS = {
    "unset": ("import opt_tf, keras; print(keras.config.backend())", None, "tensorflow"),
    "tensorflow": ("import keras, opt_tf; print('fine')", "tensorflow", "fine"),
    "env": ("import opt_tf", "jax", "KERAS_BACKEND is 'jax'"),
    "loaded": ("import keras, opt_tf", "torch", "KERAS_BACKEND is 'torch'"),
    "old": (
        "import keras; keras.__version__ = '3.9.2'; import opt_tf", "tensorflow",
        "opt_tf needs Keras >= 3.15 and < 4, found 3.9.2",
    ),
}  # fmt: skip


# Unset: the program of tests/tf/test_compilation.py is not told either.
@pytest.mark.parametrize("case", tiered(IMPORTS, lambda case: case == "env"))
def test_keras_is_told_or_must_be_told_to_use_tensorflow(case):
    code, backend, expected = IMPORTS[case]
    result = python(
        f"""
        from opt_core.errors import ConfigError
        try:
            {code}
        except ConfigError as error:
            print(error)
        """,
        backend,
    )
    assert expected in result.stdout, result.stderr
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("variant", CONFIGS)
def test_variables_are_named_by_the_dialect(folder, variant):
    config = CONFIGS[variant]
    model = model_of(folder, variant)
    specs = param_specs(config)
    for spec in specs:
        path = KERAS.path(spec)
        assert locate(model, spec).path.replace("blocks_", "blocks/") == "/".join(path)
        assert tuple(locate(model, spec).shape) == spec.shape
    assert len(specs) == len(model.trainable_variables)
    assert model.num_parameters() == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    block = model.model.decoder.blocks[0]
    assert block.self_attn.q_proj.weight.shape == (32, 32)
    assert block.final_layer_norm.epsilon == 1e-5


def test_weight_decay_follows_the_parameter_list(folder):
    model = model_of(folder, "post_ln")
    optimizer = training.make_optimizer(model, TrainConfig())
    for spec in param_specs(model.config):
        assert optimizer._use_weight_decay(locate(model, spec).value) == spec.decays, spec.name


@pytest.mark.parametrize("count", [1, 4, 5, 8, 11, 64, 65])
@pytest.mark.parametrize("out", [56, 57], ids=["in parts", "whole"])
def test_products_of_any_number_of_rows(count, out):
    rng = np.random.default_rng(0)
    weight, rows = (rng.normal(size=(n, 32)).astype(np.float32) for n in (out, count))
    found = linear.linear(tf.constant(rows[None]), tf.constant(weight))
    np.testing.assert_allclose(found[0], rows @ weight.T, rtol=0, atol=PRODUCT_ERROR)
