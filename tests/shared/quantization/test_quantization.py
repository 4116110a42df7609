"""Quantised models: the numbers they keep, what they compute with them, and what they refuse."""

from importlib import import_module

import numpy as np
import pytest

import conversion
from opt_core.checkpoints.save import save_checkpoint
from opt_core.errors import ConfigError
from opt_core.params import param_specs
from opt_core.quantization import SCHEMES, quantize_array, scheme_of
from opt_core.training.config import TrainConfig
from tests.support import oracle, oracle_generation
from tests.support.backends import BACKENDS, CLASSES, ORACLE_TOLERANCE, make_backend
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts

pytestmark = pytest.mark.dealt


@pytest.fixture(autouse=True)
def weights_alone(monkeypatch):
    """PyTorch's kernels round more (tests/torch/test_int8.py and test_int4.py)."""
    if "torch" in BACKENDS:
        monkeypatch.setattr("opt_torch._private.int8_linear", None)
        monkeypatch.setattr("opt_torch._private.int4_linear", None)


VARIANTS = {**CONFIGS, "untied": CONFIGS["pre_ln"].replace(tie_word_embeddings=False)}


def quantized(config, head, scheme):
    """The oracle's parameters, quantised ones as their numbers, and as what these stand for."""
    params, numbers = oracle.random_params(config, head), {}
    for spec in param_specs(config, head):
        kept = scheme_of(spec, scheme)
        if kept is not None:
            numbers[spec.name] = quantize_array(spec.name, params[spec.name], kept)
            params[spec.name] = numbers[spec.name].dequantize()
    return params, numbers


def parameter(backend, model, spec):
    checkpoint = import_module(f"opt_{backend.name}.checkpoint")
    return backend.numpy(checkpoint.get_parameter(model, spec))


def bytes_held(backend, model):
    """Bytes of all tensors of a model, each counted once."""
    if backend.name == "torch":
        tensors = [*model.parameters(), *model.buffers()]
        return sum(t.nbytes for t in tensors)
    if backend.name == "tf":
        kept = [v for v in model.variables if "seed" not in v.path]
        return sum(v.numpy().nbytes for v in kept)
    nnx = import_module("flax.nnx")
    kept = nnx.state(model, nnx.Not(nnx.RngState))
    return sum(v.nbytes for v in import_module("jax").tree.leaves(kept))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("head", CLASSES)
def test_weights_are_the_scheme_s_and_outputs_the_oracle_s(backend, folder, head, scheme):
    config = VARIANTS["pre_ln"]
    model = backend.load(folder(config, head), head, quantize=scheme)
    params, numbers = quantized(config, head, scheme)
    specs = param_specs(config, head)
    for spec in specs:
        np.testing.assert_array_equal(parameter(backend, model, spec), params[spec.name])
    sizes = [n.nbytes for n in numbers.values()]
    rest = sum(4 * spec.size for spec in specs if spec.name not in numbers)
    assert bytes_held(backend, model) == sum(sizes) + rest
    ids = make_prompts(config, 2, 7)
    ours = backend.run(model, input_ids=ids, output_hidden_states=True)
    theirs = oracle.forward(params, config, ids)
    close = {"rtol": 0, "atol": ORACLE_TOLERANCE}
    np.testing.assert_allclose(ours.hidden_states[-1], theirs.last_hidden_state, **close)
    if head == "causal_lm":
        np.testing.assert_allclose(ours.logits, theirs.logits, **close)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ["post_ln", "galactica", "untied"])
def test_logits_equal_the_oracle_on_the_dequantised_weights(backend, folder, variant, scheme):
    config = VARIANTS[variant]
    model = backend.load(folder(config), quantize=scheme)
    ids, mask = make_prompts(config, 2, 7), make_mask("left", [7, 4])
    ours = backend.run(model, input_ids=ids, attention_mask=mask).logits
    params, _ = quantized(config, "causal_lm", scheme)
    theirs = oracle.forward(params, config, ids, mask).logits
    seen = mask.astype(bool)
    np.testing.assert_allclose(ours[seen], theirs[seen], rtol=0, atol=ORACLE_TOLERANCE)


def test_greedy_text_is_that_of_a_float_model_with_the_dequantised_weights(
    backend, folder, tmp_path
):
    config = VARIANTS["post_ln"]
    params, _ = quantized(config, "causal_lm", "int8")
    fetch = {name: lambda value=value: value for name, value in params.items()}
    save_checkpoint(tmp_path, config, fetch, param_specs(config), "float32")
    ours, theirs = backend.load(folder(config), quantize="int8"), backend.load(tmp_path)
    ids = make_prompts(config, 2, 7)
    given = {"attention_mask": make_mask("left", [7, 4]), "max_new_tokens": 12}
    greedy = backend.generate(ours, ids, **given)
    np.testing.assert_array_equal(greedy, backend.generate(theirs, ids, **given))
    steps = np.stack([backend.numpy(t) for t in ours.stream(ids, **given)], 1)
    np.testing.assert_array_equal(steps, greedy[:, 7:])


def test_beams_and_samples_come_from_the_dequantised_weights(backend, folder):
    config = VARIANTS["pre_ln"]
    params, _ = quantized(config, "causal_lm", "int4")
    model = backend.load(folder(config), quantize="int4")
    ids = make_prompts(config, 1, 7)
    given = {"max_new_tokens": 5, "eos_token_id": None}
    beams = backend.generate(model, ids, num_beams=3, **given)
    best = oracle_generation.beam_search(params, config, ids[0], num_beams=3, max_new_tokens=5)
    assert tuple(beams[0, 7:].tolist()) == best[0].tokens
    # The likeliest of one token is no draw at all.
    sampled = backend.generate(model, ids, do_sample=True, top_k=1, **given)
    greedy = oracle_generation.greedy(params, config, ids, max_new_tokens=5)
    np.testing.assert_array_equal(sampled, greedy)


def test_half_precision_computes_with_the_numbers_of_the_file(backend, folder):
    config = VARIANTS["pre_ln"]
    model = backend.load(folder(config), quantize="int8", dtype="bfloat16")
    params, _ = quantized(config, "causal_lm", "int8")
    for spec in param_specs(config):
        if scheme_of(spec, "int8"):
            np.testing.assert_array_equal(parameter(backend, model, spec), params[spec.name])
    logits = backend.call(model, input_ids=make_prompts(config, 1, 5)).logits
    assert str(logits.dtype).endswith(("bfloat16", "bfloat16'>"))


@pytest.mark.parametrize("scheme", ["int2", "", 8, ["int8"]])
def test_other_schemes_are_refused(backend, folder, scheme):
    with pytest.raises(ConfigError, match=r'quantize: expected "int8", "int4" or None, received'):
        backend.load(folder("pre_ln"), quantize=scheme)


def test_what_needs_float_weights_is_refused(backend, folder, tmp_path):
    model = backend.load(folder("pre_ln"), quantize="int8")
    training, export = (
        import_module(f"opt_{backend.name}.{name}") for name in ("training", "export")
    )
    kind = {"torch": "program", "tf": "saved_model", "flax": "stablehlo"}[backend.name]
    given = {} if backend.name == "torch" else {"max_prompt": 8, "max_new_tokens": 2}
    acts = {
        "make_optimizer": lambda: training.make_optimizer(model, TrainConfig()),
        "export": lambda: getattr(export, f"export_{kind}")(model, tmp_path / "saved", **given),
        "to_torch": lambda: conversion.to_torch(model),
    }
    if backend.name == "tf":
        acts["training=True"] = lambda: model(make_prompts(model.config, 1, 5), training=True)
    else:
        acts["train"] = lambda: model.train()
    for name, act in acts.items():
        with pytest.raises(ConfigError, match=f"{name}: .* quantised weights can only be run"):
            act()
    assert not (tmp_path / "saved").exists()


@pytest.mark.skipif("flax" not in BACKENDS, reason="only Flax has these options")
def test_meshes_and_scanned_layers_are_refused(folder):
    flax, mesh = make_backend("flax"), import_module("opt_flax.sharding").make_mesh()
    for name, value in {"mesh": mesh, "scan_layers": True}.items():
        with pytest.raises(ConfigError, match=f"quantize: expected None with {name}, received"):
            flax.load(folder("pre_ln"), quantize="int8", **{name: value})


@pytest.mark.skipif("torch" not in BACKENDS, reason="only PyTorch converts modules")
def test_scales_stay_float32_when_a_model_is_converted(folder):
    torch = import_module("torch")
    model = make_backend("torch").load(folder("pre_ln"), quantize="int8").to(torch.bfloat16)
    weight = model.get_decoder().embed_tokens.weight
    assert (model.dtype, weight.dtype) == (torch.bfloat16, torch.bfloat16)
    assert weight.scales.dtype == torch.float32
    assert model.lm_head.weight is weight
    assert model(torch.tensor([[2, 5]])).logits.dtype == torch.bfloat16
