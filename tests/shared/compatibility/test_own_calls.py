"""Generation calls a model whose call is a caller's, as `transformers` does at each step."""

import numpy as np
import pytest

from opt_core.errors import GenerationError, OPTError
from tests.support.backends import BACKENDS
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
IDS, MASK = make_prompts(CONFIG, 2, 6), make_mask("left", [6, 4])
FAVOURITE = 7
CALLS = {"torch": "forward", "tf": "call", "flax": "__call__"}


def extend(backend, change):
    """A class whose call changes the logits."""
    base, name = backend.model_class("causal_lm"), CALLS[backend.name]

    def call(self, *args, **kwargs):
        out = getattr(base, name)(self, *args, **kwargs)
        out["logits"] = change(out.logits)
        return out

    return type("Own", (base,), {name: call, "__module__": __name__})


@pytest.fixture
def favouring(backend, folder):
    bias = np.zeros(CONFIG.vocab_size, np.float32)
    bias[FAVOURITE] = 1e4
    return extend(backend, lambda logits: logits + backend.array(bias)).from_pretrained(
        folder(CONFIG)
    )


@pytest.mark.parametrize(
    "settings", [{}, {"num_beams": 2}, {"do_sample": True, "seed": 1}], ids=str
)
def test_its_logits_are_those_that_tokens_are_chosen_by(backend, favouring, settings):
    settings = {"do_sample": False, "max_new_tokens": 3, "eos_token_id": None, **settings}
    assert (backend.generate(favouring, IDS, **settings)[:, -3:] == FAVOURITE).all()
    if "num_beams" not in settings:
        tokens = favouring.stream(IDS, **settings)
        assert all((backend.numpy(one) == FAVOURITE).all() for one in tokens)


@pytest.mark.parametrize("beams", [1, 2])
def test_one_that_changes_nothing_writes_the_same(backend, folder, beams):
    own = extend(backend, lambda logits: logits).from_pretrained(folder(CONFIG))
    settings = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    expected, found = (
        backend.generate(model, IDS, attention_mask=MASK, **settings)
        for model in (backend.load(folder(CONFIG)), own)
    )
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(GenerationError, match="contrastive search does not call Own"):
        own.generate(IDS, penalty_alpha=0.5, top_k=3, do_sample=False, max_new_tokens=2)


@pytest.mark.parametrize("backend", [n for n in BACKENDS if n != "torch"], indirect=True)
def test_inside_a_program_it_is_refused(backend, favouring):
    if backend.name == "flax":
        import jax

        run = jax.jit(lambda ids: favouring.generate(ids, max_new_tokens=2, do_sample=False))
    else:
        import tensorflow as tf

        run = tf.function(lambda ids: favouring.generate(ids, max_new_tokens=2, do_sample=False))
    with pytest.raises(GenerationError, match="generate does not call Own itself"):
        run(backend.array(IDS))


def test_a_class_that_extends_the_base_is_told_what_to_extend(backend, folder):
    base = backend.model_class("causal_lm")
    common = next(kind for kind in base.__mro__ if kind.__name__.endswith("OPTPreTrainedModel"))
    reward = type("Reward", (common,), {"__module__": __name__})
    for make in (lambda: reward.from_pretrained(folder(CONFIG)), lambda: reward(CONFIG)):
        with pytest.raises(OPTError, match="Reward: a class of your own extends OPTModel or one"):
            make()
