"""`generate` inside the user's own `tf.function`, and saved with it."""

import numpy as np
import pytest
import tensorflow as tf

from opt_tf import TFOPTForCausalLM
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
MASK = make_mask("left", [7, 4]).astype(np.int32)
IDS = np.where(MASK, make_prompts(CONFIG, 2, 7), 1).astype(np.int32)
SETTINGS = {"max_new_tokens": 6, "eos_token_id": list(range(40, 50)), "pad_token_id": 1}


@pytest.fixture(scope="module")
def model(folder):
    return TFOPTForCausalLM.from_pretrained(folder(CONFIG))


@pytest.mark.parametrize("extra", tiered([{}, {"num_beams": 2}], lambda extra: not extra), ids=str)
def test_compiled_by_xla(model, extra):
    plain = model.generate(IDS, MASK, **SETTINGS, **extra).numpy()
    compiled = tf.function(model.generate, jit_compile=True)
    found = compiled(tf.constant(IDS), tf.constant(MASK), **SETTINGS, **extra).numpy()
    np.testing.assert_array_equal(found[:, : plain.shape[1]], plain)
    assert (found[:, plain.shape[1] :] == 1).all()


@pytest.mark.parametrize("shape", tiered([[2, None], [None, 7]], lambda shape: shape[0] == 2))
def test_a_users_module_is_saved_with_it(model, shape, tmp_path):
    spec = tf.TensorSpec(shape, tf.int32)

    class Server(tf.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        @tf.function(input_signature=[spec, spec])
        def serve(self, input_ids, attention_mask):
            out = self.model.generate(
                input_ids, attention_mask, return_dict_in_generate=True, **SETTINGS
            )
            return {"sequences": out["sequences"]}

    server = Server()
    tf.saved_model.save(server, tmp_path, signatures={"serving_default": server.serve})
    served = tf.saved_model.load(tmp_path).signatures["serving_default"]
    found = served(input_ids=tf.constant(IDS), attention_mask=tf.constant(MASK))["sequences"]
    plain = model.generate(IDS, MASK, **SETTINGS).numpy()
    np.testing.assert_array_equal(found.numpy()[:, : plain.shape[1]], plain)


def test_what_needs_python_is_refused(model):
    with pytest.raises(Exception, match=r"inside jax\.jit or tf.function nothing can run"):
        tf.function(
            lambda ids: model.generate(
                ids, output_scores=True, return_dict_in_generate=True, max_new_tokens=2
            )
        )(tf.constant(IDS))
