"""Quantised checkpoints converted, and what live libraries make of the same files."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conversion
from opt_core.checkpoints.load import open_checkpoint
from opt_core.checkpoints.plan import plan_load
from opt_core.checkpoints.save import save_checkpoint
from opt_core.config import OPTConfig
from opt_core.errors import ConfigError
from opt_core.params import param_specs
from opt_core.quantization import SCHEMES, QuantizedTensor, quantize_array, scheme_of
from tests.support import oracle
from tests.support.configs import CONFIGS
from tests.support.files import quantized_fixtures as files
from tests.support.files.quantized_fixtures import CONFIG, Made
from tests.support.reference import make_prompts

LIVE_TOLERANCE = 2e-5
"""Largest difference of logits of order 10 from the float64 oracle, as everywhere."""
WIDE = CONFIGS["pre_ln"].replace(hidden_size=64, ffn_dim=128)
"""Whole groups of 64: compressed-tensors takes no others."""


def write(folder: Path, config: OPTConfig, dtype: str = "float32") -> dict[str, Any]:
    """A random model, and its parameters."""
    specs, values = param_specs(config), oracle.random_params(config, "causal_lm")
    tensors = {s.name: lambda s=s: values[s.name].astype(dtype) for s in specs}
    save_checkpoint(folder, config, tensors, specs, dtype)
    return {name: array.astype(dtype) for name, array in values.items()}


def quantised(values: dict[str, Any], config: OPTConfig, scheme: str) -> dict[str, Any]:
    """Parameters, in a scheme."""
    made = dict(values)
    for spec in param_specs(config):
        if kept := scheme_of(spec, scheme):
            made[spec.name] = quantize_array(spec.name, values[spec.name], kept)
    return made


def loaded(folder: Path, quantize: str | None = None) -> dict[str, Any]:
    config = OPTConfig.from_pretrained(folder)
    plan = plan_load(open_checkpoint(folder), config, "causal_lm")
    return {spec.name: values for spec, values in plan.stream(quantize=quantize)}


def weight(values: Any) -> Any:
    return values.dequantize() if isinstance(values, QuantizedTensor) else values


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_converted_model_has_the_numbers_of_a_loaded_one(scheme: str, tmp_path: Path):
    config, calls = CONFIGS["post_ln"], list[tuple[int, int]]()
    expected = quantised(write(tmp_path / "a", config, "float16"), config, scheme)
    done = conversion.convert(
        tmp_path / "a", tmp_path / "b", quantize=scheme, progress=lambda *call: calls.append(call)
    )
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]
    assert done.files.keys() == {p.name for p in (tmp_path / "b").glob("*.safetensors")}
    for name, found in loaded(tmp_path / "b", scheme).items():
        np.testing.assert_array_equal(weight(found), weight(expected[name]))
        assert isinstance(found, QuantizedTensor) == isinstance(expected[name], QuantizedTensor)
    told = conversion.describe(tmp_path / "b")
    assert (told.problems, told.notes) == ((), ())
    assert told.quantization is not None
    assert told.quantization.startswith("compressed-tensors: ")
    assert f"12 weights as {scheme}" in told.quantization or scheme == "int8"
    assert told.parameters == conversion.describe(tmp_path / "a").parameters
    assert told.nbytes < 0.8 * conversion.describe(tmp_path / "a").nbytes
    # And back, in the type that the rest of it has.
    conversion.convert(tmp_path / "b", tmp_path / "c")
    for name, array in loaded(tmp_path / "c").items():
        assert array.dtype == np.float16
        np.testing.assert_array_equal(array, weight(expected[name]).astype(np.float16))


@pytest.mark.parametrize("to", ["safetensors", "torch-bin", "flax-msgpack", "metaseq"])
@pytest.mark.parametrize("make", [files.gptq, files.llm_int8])
def test_files_of_other_libraries_are_converted(make: Callable[[], Made], to: str, tmp_path: Path):
    made = make()
    conversion.convert(made.write(tmp_path / "a"), tmp_path / "b", to, dtype="float32")
    conversion.convert(tmp_path / "b", tmp_path / "c")
    for name, array in loaded(tmp_path / "c").items():
        np.testing.assert_array_equal(array, made.expected[name].astype(np.float32))
    told = conversion.describe(tmp_path / "a")
    kind = "gptq: 6 weights as int4" if make is files.gptq else "bitsandbytes: 6 weights as int8"
    assert (told.quantization, told.problems) == (kind, ())


def test_numbers_that_fit_are_not_rounded_again(tmp_path: Path):
    made = files.packed(4, None, symmetric=False)
    conversion.convert(made.write(tmp_path / "a"), tmp_path / "b", quantize="int4")
    for name, array in loaded(tmp_path / "b").items():
        if ".layers." in name:
            np.testing.assert_array_equal(array, made.expected[name])


def test_only_safetensors_hold_them(tmp_path: Path):
    with pytest.raises(ConfigError, match="quantize: expected None with to='tf-h5', received"):
        conversion.convert("mini", tmp_path / "a", "tf-h5", quantize="int8")
    with pytest.raises(ConfigError, match='quantize: expected "int8", "int4" or None'):
        conversion.convert("mini", tmp_path / "a", quantize="int2")
    assert not any(tmp_path.iterdir())


@pytest.mark.hf
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("variant", ["tied", "untied", "post_ln"])
def test_transformers_computes_the_same_from_our_files(variant: str, scheme: str, tmp_path: Path):
    """Dequantised at load: left packed, compressed-tensors 0.20 has no place for zero points."""
    torch, transformers = import_module("torch"), import_module("transformers")
    projected = {"do_layer_norm_before": False, "word_embed_proj_dim": 24}
    changes = {"tied": {}, "untied": {"tie_word_embeddings": False}, "post_ln": projected}
    config = WIDE.replace(**changes[variant])
    values = quantised(write(tmp_path / "a", config), config, scheme)
    conversion.convert(tmp_path / "a", tmp_path / "b", quantize=scheme)
    ways: list[dict[str, Any]] = [
        {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    ]
    if scheme == "int8":
        ways.append({})
    ids = make_prompts(config, 2, 9)
    expected = oracle.forward({n: weight(v) for n, v in values.items()}, config, ids).logits
    for way in ways:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "b", dtype="float32", **way
        )
        with torch.no_grad():
            logits = model(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(logits, expected, rtol=0, atol=LIVE_TOLERANCE)


LIVE: dict[str, Callable[[], Made]] = {
    "packed-4": files.packed,
    "packed-4-zeros": lambda: files.packed(4, 16, symmetric=False),
    "packed-3-zeros": lambda: files.packed(3, 16, symmetric=False),
    "packed-8": lambda: files.packed(8, None),
    "int8": files.unpacked,
    "int8-zeros": lambda: files.unpacked(symmetric=False),
    "float8-channel": files.float8,
    "float8-block": lambda: files.float8("block"),
}


@pytest.mark.hf
@pytest.mark.parametrize("case", LIVE)
def test_compressed_tensors_reads_the_same_weights(case: str, tmp_path: Path):
    torch = import_module("torch")
    compressors = import_module("compressed_tensors.compressors")
    schemes = import_module("compressed_tensors.quantization")
    made = LIVE[case]()
    found = loaded(made.write(tmp_path))
    group = made.settings["config_groups"]["group_0"]
    scheme = schemes.QuantizationScheme(targets=group["targets"], weights=group["weights"])
    library = compressors.BaseCompressor.get_value_from_registry(made.settings["format"])
    checkpoint = import_module("safetensors.torch").load_file(tmp_path / "model.safetensors")
    for spec in filter(files.is_layer, param_specs(CONFIG)):
        stem = spec.name.removesuffix("weight")
        state = {n.removeprefix(stem): t for n, t in checkpoint.items() if n.startswith(stem)}
        # In float32, as here: there the scale's type is that of the product.
        state = {n: t.float() if n == "weight_scale" else t for n, t in state.items()}
        theirs = library.decompress(state, scheme)["weight"]
        assert theirs.dtype == torch.float32
        np.testing.assert_array_equal(found[spec.name], theirs.numpy())
