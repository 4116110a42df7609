"""Stacked layers."""

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax import nnx

from opt_core.params import param_specs
from opt_flax import checkpoint
from tests.support.configs import CONFIGS
from tests.support.flax_models import MODEL, SILENT, close, close_gradients, model_of
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered


@pytest.mark.parametrize("variant", tiered(CONFIGS, lambda variant: variant == "post_ln"))
def test_stacked_layers_are_the_same_model(folder, variant, tmp_path):
    config = CONFIGS[variant].replace(**SILENT)
    flat, deep = (model_of(folder, config, scan_layers=scan) for scan in (False, True))
    ids, mask = make_prompts(config, 3, 9), make_mask("left", [9, 5, 2])
    wanted = {"output_hidden_states": True, "output_attentions": True, "attention_mask": mask}

    def loss(model):
        outputs = model(ids, labels=ids, **wanted)
        return outputs.loss, outputs

    learn = nnx.jit(nnx.grad(loss, has_aux=True))
    (left, plain), (right, stacked) = (learn(model) for model in (flat, deep))
    for x, y in zip(*(jax.tree.leaves(outputs) for outputs in (plain, stacked)), strict=True):
        close(y, x)
    np.testing.assert_array_equal(*(m.generate(ids, mask, max_new_tokens=20) for m in (flat, deep)))
    nnx.update(flat, left)
    nnx.update(deep, right)
    for spec in param_specs(config):
        x, y = (checkpoint.get_parameter(m, spec) for m in (flat, deep))
        close_gradients(y, x)
    deep.save_pretrained(tmp_path)
    for path in (tmp_path, folder(config)):
        same = MODEL.from_pretrained(path, scan_layers=True)
        one = same.get_decoder().layers.fc1.weight
        assert one.shape == (config.num_hidden_layers, 56, 32)
        first = param_specs(config)[-3]
        checkpoint.set_parameter(same, first, np.full(first.shape, 7, np.float32))
        assert (np.asarray(checkpoint.get_parameter(same, first)) == 7).all()


def test_stacked_layers_compile_once(folder):
    """The program of a deep model is no longer than that of a shallow one."""
    lengths = []
    for layers in (2, 6):
        config = CONFIGS["pre_ln"].replace(num_hidden_layers=layers)
        model = MODEL(config, seed=0, scan_layers=True)
        graph, state = nnx.split(model)
        ids = jnp.zeros((1, 4), jnp.int32)
        text = jax.jit(lambda state, i, graph=graph: nnx.merge(graph, state)(i).logits)
        lengths.append(len(text.lower(state, ids).as_text().splitlines()))
    assert lengths[0] == lengths[1]
