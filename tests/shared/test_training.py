"""Training against a float64 reference, and on something small that can be learnt."""

import importlib

import numpy as np
import pytest

from opt_core.params import param_specs
from opt_core.training.config import TrainConfig
from opt_core.training.loop import SLOTS
from opt_core.training.lora import adapter_specs, initial_adapter
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts, reference, tensors

pytestmark = pytest.mark.dealt

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


def reference_steps(config, batches, smoothing=0.0):
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
        batch = batch if isinstance(batch, dict) else {"input_ids": batch, "labels": batch}
        given = tensors(batch)
        logits = model(given["input_ids"]).logits[:, :-1].flatten(0, 1)
        torch.nn.functional.cross_entropy(
            logits, given["labels"][:, 1:].flatten(), label_smoothing=smoothing
        ).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.hf
@pytest.mark.parametrize("variant", CONFIGS)
def test_three_steps_equal_float64(backend, folder, variant, monkeypatch):
    """One variant in parts, with smoothed labels, some without a say, and few logits at a time."""
    config, train = CONFIGS[variant].replace(dropout=0.0, attention_dropout=0.0), CONFIG
    batches: list = [make_prompts(config, 4, 12, seed=s) for s in range(3)]
    if variant == "post_ln":
        monkeypatch.setattr(f"opt_{backend.name}.losses.CHUNK", 5 * config.vocab_size)
        train = CONFIG.replace(gradient_accumulation_steps=2, label_smoothing=0.1)
        batches = [{"input_ids": ids, "labels": np.where(ids < 40, -100, ids)} for ids in batches]
    ours = backend.train(backend.load(folder(config)), batches, train)
    theirs = reference_steps(config, batches, train.label_smoothing)
    before = {k: v.numpy() for k, v in reference(config).named_parameters()}
    for name, value in theirs.items():
        if name.endswith("k_proj.bias"):
            continue  # its gradient is zero, and AdamW makes steps of the rounding noise
        assert np.abs(value - before[name]).max() > 10 * STEP_TOLERANCE, f"{name} did not move"
        np.testing.assert_allclose(ours[name], value, rtol=0, atol=STEP_TOLERANCE, err_msg=name)


def test_a_batch_without_a_label_changes_nothing(backend, folder):
    """Its loss is NaN, as in transformers: weight decay alone would move the weights otherwise."""
    model = backend.load(folder(CONFIGS["pre_ln"]))
    ids = make_prompts(CONFIGS["pre_ln"], 2, 9)
    training = importlib.import_module(f"opt_{backend.name}.training")
    before = backend.train(model, [], CONFIG)
    loss, _ = training.train_step(
        model,
        training.make_optimizer(model, CONFIG),
        {"input_ids": ids, "labels": np.full_like(ids, -100)},
        CONFIG,
        step=1,
    )
    assert np.isnan(loss)
    for name, value in backend.train(model, [], CONFIG).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


@pytest.mark.hf
def test_adapters_equal_float64(backend, folder):
    """Three steps of adapters: the same as in float64, and the model itself untouched."""
    config = CONFIGS["pre_ln"].replace(dropout=0.0)
    train = CONFIG.replace(lora_rank=3, lora_alpha=6.0, lora_targets=("v_proj", "fc1"))
    batches = [make_prompts(config, 4, 12, seed=s) for s in range(3)]
    model = backend.load(folder(config))
    plain = backend.train(model, batches, train)
    for name, value in reference(config).named_parameters():
        np.testing.assert_array_equal(plain[name], value.numpy().astype(np.float32))
    specs = adapter_specs(config, 3, train.lora_targets)
    checkpoint = importlib.import_module(f"opt_{backend.name}.checkpoint")
    theirs = reference_adapters(config, batches, train, specs)
    for spec in specs:
        value = backend.numpy(checkpoint.get_parameter(model, spec))
        assert abs(theirs[spec.name] - initial_adapter(spec, 0)).max() > 10 * STEP_TOLERANCE
        np.testing.assert_allclose(value, theirs[spec.name], rtol=0, atol=STEP_TOLERANCE)


def reference_adapters(config, batches, train, specs):
    """The adapters after AdamW in float64, on transformers' model with W + 2 B A for weights."""
    torch = pytest.importorskip("torch")
    model = reference(config)
    values = {s.name: torch.tensor(initial_adapter(s, 0)).double().requires_grad_() for s in specs}
    optimizer = torch.optim.AdamW(
        values.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1
    )
    for step, ids in enumerate(batches):
        optimizer.param_groups[0]["lr"] = train.learning_rate_at(step)
        weights = dict(model.named_parameters())
        for name in [n for n in values if n.endswith("lora_A.weight")]:
            key = name.replace("lora_A.", "")
            product = values[name.replace("lora_A", "lora_B")] @ values[name]
            weights[key] = weights[key] + 2 * product
        out = torch.func.functional_call(model, weights, (torch.tensor(ids),))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(
            out.logits[:, :-1].flatten(0, 1), torch.tensor(ids)[:, 1:].flatten()
        ).backward()
        torch.nn.utils.clip_grad_norm_(list(values.values()), 0.5)
        optimizer.step()
    return {name: value.detach().numpy() for name, value in values.items()}


def test_a_step_that_is_not_finite_changes_nothing(backend, folder):
    config = CONFIGS["pre_ln"].replace(dropout=0.0, num_hidden_layers=1)
    training = importlib.import_module(f"opt_{backend.name}.training")
    trainer = importlib.import_module(f"opt_{backend.name}.trainer")
    made = trainer.Trainer(backend.load(folder(config)), CONFIG)
    ids = make_prompts(config, 2, 6)
    training.train_step(made.model, made.optimizer, ids, CONFIG, 0)
    bias = next(s for s in made.specs if s.name.endswith("final_layer_norm.bias"))
    good = made.get("value", bias).copy()
    made.put("value", bias, np.full_like(good, np.nan))
    before = {(slot, s.name): made.get(slot, s).copy() for slot in SLOTS for s in made.specs}
    loss, norm = made.step(ids, 1)
    assert not np.isfinite([loss, norm]).all()
    assert made.updates == 1
    for spec in made.specs:
        for slot in SLOTS:
            np.testing.assert_array_equal(made.get(slot, spec), before[slot, spec.name])
    made.put("value", bias, good)
    assert np.isfinite(made.step(ids, 1)).all()
    assert made.updates == 2


@pytest.mark.xla
def test_a_small_text_is_learnt(backend):
    """A period of 16 tokens: the loss must fall to nearly nothing, and generation continue it."""
    config = CONFIGS["pre_ln"].replace(dropout=0.0, num_hidden_layers=1, max_position_embeddings=64)
    period = np.random.default_rng(0).permutation(np.arange(10, 26))
    stream = np.tile(period, 20)
    train = TrainConfig(
        max_steps=100, batch_size=8, sequence_length=32, learning_rate=5e-3, warmup_steps=10
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


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_evaluation_is_the_mean_over_tokens(backend, folder, quantize):
    model = backend.load(folder("pre_ln"), quantize=quantize)
    rows = [make_prompts(CONFIGS["pre_ln"], n, length) for n, length in ((3, 9), (1, 20))]
    losses = [float(backend.run(model, input_ids=r, labels=r).loss) for r in rows]
    expected = (losses[0] * 3 * 8 + losses[1] * 19) / (3 * 8 + 19)
    np.testing.assert_allclose(backend.evaluate(model, rows), expected, rtol=1e-6)
