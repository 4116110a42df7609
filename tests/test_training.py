"""Training against a float64 reference, and on something small that can be learnt."""

import numpy as np
import pytest

from opt_core.params import param_specs
from opt_core.training import TrainConfig
from tests.configs import CONFIGS
from tests.reference import make_prompts, reference, tensors

STEP_TOLERANCE = 1e-5
"""Of parameters after three optimizer steps."""
CONFIG = TrainConfig(
    max_steps=6,
    warmup_steps=2,
    learning_rate=1e-3,
    weight_decay=0.1,
    max_grad_norm=0.5,
    adam_epsilon=1e-6,
)


def reference_steps(config, batches):
    """Three AdamW steps of transformers' model in float64, written out by the config's rules."""
    torch = pytest.importorskip("torch")
    model = reference(config).requires_grad_(True)
    decayed = {spec.name for spec in param_specs(config) if spec.decays}
    assert {name for name, p in model.named_parameters() if p.ndim == 2} == decayed
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-6)
    for rate, batch in zip([5e-4, 1e-3, 1e-3], batches, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        model(**tensors({"input_ids": batch, "labels": batch})).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.hf
@pytest.mark.parametrize("variant", CONFIGS)
def test_three_steps_equal_float64(backend, folder, variant):
    config = CONFIGS[variant].replace(dropout=0.0, attention_dropout=0.0)
    batches = [make_prompts(config, 4, 12, seed=s) for s in range(3)]
    ours = backend.train(backend.load(folder(config)), batches, CONFIG)
    theirs = reference_steps(config, batches)
    before = {k: v.numpy() for k, v in reference(config).named_parameters()}
    for name, value in theirs.items():
        if name.endswith("k_proj.bias"):
            continue  # its gradient is zero, and AdamW makes steps of the rounding noise
        assert np.abs(value - before[name]).max() > 10 * STEP_TOLERANCE, f"{name} did not move"
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=STEP_TOLERANCE, err_msg=name)


def test_a_small_text_is_learnt(backend):
    """A period of 16 tokens: the loss must fall to nearly nothing, and generation continue it."""
    config = CONFIGS["pre_ln"].replace(dropout=0.0, max_position_embeddings=64)
    period = np.random.default_rng(0).permutation(np.arange(10, 26))
    stream = np.tile(period, 20)
    train = TrainConfig(
        max_steps=150, batch_size=8, sequence_length=32, learning_rate=5e-3, warmup_steps=10
    )
    model = backend.model_class("causal_lm")(config, seed=0)
    rng = np.random.default_rng(0)
    batches = (
        np.stack([stream[s : s + 32] for s in rng.integers(0, len(stream) - 32, 8)])
        for _ in range(train.max_steps)
    )
    losses = backend.fit(model, batches, train)
    assert losses[0] > 4
    assert losses[-1] < 0.2
    out = backend.generate(model, stream[None, :8], max_new_tokens=16, eos_token_id=None)
    np.testing.assert_array_equal(out[0], stream[:24])


def test_evaluation_is_the_mean_over_tokens(backend, folder):
    model = backend.load(folder("pre_ln"))
    rows = [make_prompts(CONFIGS["pre_ln"], n, length) for n, length in ((3, 9), (1, 20))]
    losses = [float(backend.run(model, input_ids=r, labels=r).loss) for r in rows]
    expected = (losses[0] * 3 * 8 + losses[1] * 19) / (3 * 8 + 19)
    np.testing.assert_allclose(backend.evaluate(model, rows), expected, rtol=1e-6)
