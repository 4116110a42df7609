"""Functions, hooks and inputs of a caller's in the way of a model's call: generation sees them."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from tests.support.backends import make_backend  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_prompts  # noqa: E402

TORCH = make_backend("torch")
CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
IDS = torch.from_numpy(make_prompts(CONFIG, 1, 5)).long()
SETTINGS = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}


def favour(out):
    out.logits[..., 7] += 1e4
    return out


def test_functions_and_hooks(folder):
    model = TORCH.load(folder(CONFIG))
    plain, forward = model.generate(IDS, **SETTINGS), model.forward
    model.forward = lambda *args, **kwargs: favour(forward(*args, **kwargs))
    assert (model.generate(IDS, **SETTINGS)[:, -3:] == 7).all()
    del model.forward
    hook = model.register_forward_hook(lambda module, args, out: favour(out))
    assert (model.generate(IDS, **SETTINGS)[:, -3:] == 7).all()
    hook.remove()
    assert torch.equal(model.generate(IDS, **SETTINGS), plain)


def test_inputs_that_a_class_prepares(folder):
    base = TORCH.model_class("causal_lm")

    class Own(base):
        def prepare_inputs_for_generation(self, input_ids, **kwargs):
            given = super().prepare_inputs_for_generation(input_ids, **kwargs)
            return given | {"input_ids": torch.full_like(given["input_ids"], 9)}

    found = Own.from_pretrained(folder(CONFIG)).generate(IDS, **SETTINGS)
    nines = torch.full_like(IDS, 9)
    ids = nines
    for column in range(3):  # whatever it wrote, it reads nines
        expected = TORCH.load(folder(CONFIG))(ids).logits[:, -1].argmax(-1)
        assert found[:, 5 + column].equal(expected)
        ids = torch.cat([ids, nines[:, :1]], 1)


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.parametrize("beams", [1, 2])
def test_prompts_that_peft_has_trained(folder, kind, beams):
    peft = pytest.importorskip("peft")
    settings = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3}
    model = peft.get_peft_model(TORCH.load(folder(CONFIG)), getattr(peft, kind)(**settings)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter))
    found = model.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), num_beams=beams, **SETTINGS
    )
    if beams == 1:  # written again without any cache
        ids = IDS
        for _ in range(3):
            logits = model(ids, attention_mask=torch.ones_like(ids)).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        np.testing.assert_array_equal(found, ids)
    plain = model.get_base_model().generate(IDS, num_beams=beams, **SETTINGS)
    assert not torch.equal(found, plain)
    assert not model.get_base_model()._is_patched()  # PEFT has put back what it took
