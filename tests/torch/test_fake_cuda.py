"""A CUDA device without one: nothing is left on the host, and how often it waits for the device.

Fake tensors (tests/support/fake_cuda.py) stand in for the hardware: no number is computed.
"""

import itertools

import pytest

torch = pytest.importorskip("torch")

from tests.support.backends import CLASSES  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.fake_cuda import DEVICE, fake_cuda, fake_model  # noqa: E402
from tests.support.tiers import tiered  # noqa: E402

NEW = 3
PLAIN = {"max_new_tokens": NEW, "eos_token_id": None, "do_sample": False}
SAMPLED = {**PLAIN, "do_sample": True, "seed": 0}

ONE = {name: config.replace(num_hidden_layers=1) for name, config in CONFIGS.items()}
"""Every layer waits as often as the first."""

SETTINGS = {
    "greedy": PLAIN,
    "sampled": {**SAMPLED, "top_k": 5, "top_p": 0.9, "temperature": 0.7, "min_p": 0.1},
    "typical": {**SAMPLED, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01},
    "filters": {
        **PLAIN, "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4]],
        "suppress_tokens": [5], "forced_eos_token_id": 2,
    },
    "copies": {**SAMPLED, "num_return_sequences": 3},
    "chunks": {**PLAIN, "prefill_chunk_size": 2},
}  # fmt: skip


def prompts(width=5):
    return torch.ones(2, width, dtype=torch.long, device=DEVICE)


def waits_of(waits, model, **settings):
    waits.clear()
    out = model.generate(prompts(), **settings)
    assert out.device == DEVICE
    return len(waits)


@pytest.mark.parametrize(
    ("variant", "attention", "head"),
    tiered(
        itertools.product(CONFIGS, ["sdpa", "eager"], CLASSES),
        lambda variant, attention, head: (
            (attention == "sdpa" and (variant == "pre_ln" or head == "causal_lm"))
            or (variant, head) == ("pre_ln", "causal_lm")
        ),
    ),
)
def test_a_forward_pass_stays_on_the_device(variant, attention, head):
    with fake_cuda() as waits, torch.no_grad():
        model = fake_model(CONFIGS[variant], head, attn_implementation=attention)
        for inputs, most in (
            ({}, 1),
            ({"attention_mask": torch.ones(2, 5, dtype=torch.long, device=DEVICE)}, 2),
            ({"position_ids": prompts()}, 1),
        ):
            waits.clear()
            out = model(prompts(), **inputs, output_hidden_states=True)
            assert {state.device for state in out.hidden_states} == {DEVICE}
            assert out[0].device == DEVICE
            assert len(waits) <= most, waits


@pytest.mark.parametrize(
    ("name", "quantize"),
    tiered(  # weights and filters know nothing of one another
        itertools.product(SETTINGS, [None, "int8", "int4"]),
        lambda name, quantize: quantize is None or name == "greedy",
    ),
)
def test_no_step_of_generation_waits(name, quantize):
    with fake_cuda(fill=3) as waits:
        model = fake_model(ONE["pre_ln"], quantize=quantize)
        few, many = (
            waits_of(waits, model, **{**SETTINGS[name], "max_new_tokens": new})
            for new in (NEW, 2 * NEW)
        )
        assert few == many <= 6, waits


def test_ends_are_looked_for_every_sixteen_tokens():
    with fake_cuda(fill=0) as waits:
        model = fake_model(ONE["post_ln"])
        few, many = (
            waits_of(waits, model, **{**PLAIN, "eos_token_id": 2, "max_new_tokens": new})
            for new in (16, 32)
        )
        assert many - few == 1


def test_beams_wait_once_a_step():
    with fake_cuda(fill=0) as waits:
        model = fake_model(ONE["galactica"])
        few, many = (
            waits_of(waits, model, **{**PLAIN, "num_beams": 3, "max_new_tokens": new})
            for new in (2, 5)
        )
        assert many - few == 3


@pytest.mark.parametrize(
    "settings",
    [{"penalty_alpha": 0.6, "top_k": 4}, {"guidance_scale": 2.0}],
    ids=str,
)
def test_other_ways_to_generate(settings):
    """Not drafts: how many of them are accepted decides what runs."""
    with fake_cuda(fill=3):
        model = fake_model(ONE["pre_ln"])
        out = model.generate(prompts(), **{**PLAIN, "max_new_tokens": 6}, **settings)
        assert out.shape == (2, 11)


def test_a_loop_of_ones_own():
    with fake_cuda() as waits, torch.no_grad():
        model = fake_model(ONE["pre_ln"])
        out = model(prompts())
        waits.clear()
        out = model(prompts(1), past_key_values=out.past_key_values)
        assert out.logits.device == DEVICE
        assert len(waits) <= 1, waits


def test_a_loss_in_training():
    """Its gradients are computed by threads of the device, which is not there."""
    with fake_cuda():
        model = fake_model(ONE["pre_ln"]).train()
        assert model(prompts(), labels=prompts()).loss.device == DEVICE


def test_the_stand_in_refuses_two_devices_and_counts_waits():
    with fake_cuda() as waits:
        here = torch.ones(2)
        with pytest.raises(RuntimeError, match="same device"):
            _ = prompts(2)[0] + here
        assert not waits
        assert float(torch.zeros(3, device=DEVICE).sum()) == 1
        assert len(waits) == 1
