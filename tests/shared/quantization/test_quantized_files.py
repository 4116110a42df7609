"""Quantised models saved and loaded again, and other libraries' files, in every backend."""

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opt_core.checkpoints.quantized.settings import SIDE_FILE
from opt_core.errors import ArgumentError, ConfigError
from opt_core.params import param_specs
from opt_core.quantization import SCHEMES, QuantizedTensor, is_quantized
from tests.support import oracle
from tests.support.backends import BACKENDS, CLASSES, ORACLE_TOLERANCE, make_backend
from tests.support.configs import CONFIGS
from tests.support.files import quantized_fixtures as files
from tests.support.reference import make_prompts

pytestmark = pytest.mark.dealt


@pytest.fixture(autouse=True)
def weights_alone(monkeypatch):
    """PyTorch may round inputs too (tests/torch/test_int8.py); all three compute the same here."""
    if "torch" in BACKENDS:
        monkeypatch.setattr("opt_torch._private.int8_linear", None)


def numbers(backend: Any, model: Any) -> dict[str, Any]:
    """Parameters of a model as it keeps them: arrays, or the parts of quantised weights."""
    checkpoint = import_module(f"opt_{backend.name}.checkpoint")
    found: dict[str, Any] = {}
    for spec in param_specs(model.config, model.head):
        kept = checkpoint.get_numbers(model, spec)
        if isinstance(kept, QuantizedTensor):
            found[f"{spec.name}: {kept.scheme}"] = kept.values
            found[f"{spec.name}: scales"] = kept.scales
            found[f"{spec.name}: zeros"] = kept.zeros
        else:
            found[spec.name] = np.asarray(kept, np.float32)
    return found


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], name)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ["pre_ln", "post_ln"])
def test_a_saved_model_is_loaded_with_the_numbers_it_had(
    backend, folder, variant, scheme, tmp_path
):
    model = backend.load(folder(CONFIGS[variant]), quantize=scheme)
    kept = numbers(backend, model)
    assert any(name.endswith(scheme) for name in kept)
    model.save_pretrained(tmp_path)
    for asked in (None, scheme):
        again = backend.load(tmp_path, quantize=asked)
        assert is_quantized(again)
        assert_same(numbers(backend, again), kept)
    ids = make_prompts(model.config, 1, 6)
    logits = [backend.run(m, input_ids=ids).logits for m in (model, again)]
    np.testing.assert_array_equal(*logits)
    again.save_pretrained(tmp_path)  # over the files that it may still be looking at
    assert_same(numbers(backend, backend.load(tmp_path)), kept)


@pytest.mark.parametrize("head", [head for head in CLASSES if head != "causal_lm"])
def test_other_heads_stay_in_floating_point(backend, folder, head, tmp_path):
    model = backend.load(folder(CONFIGS["pre_ln"], head), head, quantize="int4", dtype="bfloat16")
    model.save_pretrained(tmp_path)
    again = backend.load(tmp_path, head, dtype="auto")
    assert_same(numbers(backend, again), numbers(backend, model))
    name = {"sequence_classification": "score", "question_answering": "qa_outputs"}.get(head)
    if name:
        assert f"{name}.weight" in numbers(backend, again)


def test_every_backend_loads_what_any_of_them_saved(folder, tmp_path):
    found = {}
    for name in BACKENDS:
        backend = make_backend(name)
        path = tmp_path / name
        backend.load(folder(CONFIGS["post_ln"]), quantize="int4").save_pretrained(path)
        found[name] = {file.name: file.read_bytes() for file in path.iterdir()}
        for other in map(make_backend, BACKENDS):
            model = other.load(path)
            assert_same(numbers(other, model), numbers(backend, backend.load(path)))
    first, *rest = found.values()
    assert all(files_ == first for files_ in rest)


@pytest.mark.parametrize("make", [files.gptq, files.awq, files.four_bits, files.packed])
def test_files_of_other_libraries_are_models_in_floating_point(backend, make, tmp_path):
    made = make()
    model = backend.load(made.write(tmp_path))
    assert not is_quantized(model)
    params = {name: array.astype(np.float32) for name, array in made.expected.items()}
    assert_same(numbers(backend, model), params)
    if make is files.gptq:
        ids = make_prompts(files.CONFIG, 2, 7)
        ours, theirs = backend.run(model, input_ids=ids), oracle.forward(params, files.CONFIG, ids)
        scale = np.abs(theirs.logits).max()
        close = {"rtol": 0, "atol": ORACLE_TOLERANCE * max(1, scale)}
        np.testing.assert_allclose(ours.logits, theirs.logits, **close)


def test_their_numbers_are_kept_where_small_weights_are_asked_for(backend, tmp_path):
    made = files.packed(4, None, symmetric=False)
    model = backend.load(made.write(tmp_path), quantize="int4")
    kept = numbers(backend, model)
    checkpoint = import_module(f"opt_{backend.name}.checkpoint")
    for spec in filter(files.is_layer, param_specs(files.CONFIG)):
        assert f"{spec.name}: int4" in kept
        weight = checkpoint.get_numbers(model, spec).dequantize()
        np.testing.assert_array_equal(weight, made.expected[spec.name])


def test_what_quantised_files_cannot_be(backend, folder, tmp_path):
    model = backend.load(folder(CONFIGS["pre_ln"]), quantize="int8")
    for name, value in {"state_dict": {}, "safe_serialization": False, "saved_model": True}.items():
        with pytest.raises(ArgumentError, match=f"save_pretrained: {name}.* quantised weights"):
            model.save_pretrained(tmp_path / "new", **{name: value})
    assert not (tmp_path / "new").exists()
    model.save_pretrained(tmp_path / "new")
    with pytest.raises(ConfigError, match="quantize: expected 'int8', which the weights are store"):
        backend.load(tmp_path / "new", quantize="int4")
    if backend.name == "flax":
        with pytest.raises(ConfigError, match="quantize: expected None with scan_layers"):
            backend.load(tmp_path / "new", scan_layers=True)


def test_models_of_a_variant_are_no_others(backend, folder, tmp_path: Path):
    with pytest.raises(ArgumentError, match="variant is not supported with quantised weights"):
        backend.load(folder("pre_ln"), quantize="int8").save_pretrained(tmp_path, variant="q")
    assert not (tmp_path / SIDE_FILE).exists()
