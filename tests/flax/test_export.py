"""Exported Flax programs: run by JAX alone, for any number of rows, with the same results."""

import subprocess
import sys
from functools import partial
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from jax import export  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

import opt_flax  # noqa: E402
from opt_core.errors import CheckpointError, ConfigError, GenerationError  # noqa: E402
from opt_flax import sharding  # noqa: E402
from opt_flax.export import export_stablehlo  # noqa: E402
from tests.support.backends import ORACLE_TOLERANCE  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_mask, make_prompts  # noqa: E402
from tests.support.tiers import tiered  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def quickly_compiled():
    """Programs that run once: compiling them well would take longer than running them."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


LOAD: Any = opt_flax.FlaxOPTForCausalLM.from_pretrained
ONE_LAYER = {name: config.replace(num_hidden_layers=1) for name, config in CONFIGS.items()}

SETTINGS = {
    "greedy": ("pre_ln", {"eos_token_id": list(range(40)), "pad_token_id": 1}),
    "sampled": ("post_ln", {"do_sample": True, "top_k": 9, "num_return_sequences": 2}),
    "beams": ("galactica", {"num_beams": 3, "num_return_sequences": 2}),
}

SERVE = """
    import sys
    import jax, numpy as np
    from safetensors.numpy import load_file
    weights = load_file("weights.safetensors")
    forward, generate = (
        jax.export.deserialize(bytearray(open(f"{name}.jax", "rb").read())).call
        for name in ("forward", "generate")
    )
    data = np.load("in.npz")
    logits = forward(weights, data["ids"], data["mask"])["logits"]
    ids = generate(weights, data["ids"], data["mask"])["sequences"]
    np.savez("out.npz", logits=logits, ids=ids)
    assert not {"opt_core", "opt_flax", "flax"} & sys.modules.keys()
"""


def prompts(config, lengths):
    mask = make_mask("left", lengths).astype(np.int32)
    return make_prompts(config, *mask.shape).astype(np.int32), mask


def expected(model, ids, mask, settings, new=10):
    """The ids of `model.generate`, filled up as an exported program does."""
    found = np.asarray(model.generate(ids, mask, seed=3, **settings))
    pad = settings.get("pad_token_id", model.config.pad_token_id)
    free = ids.shape[1] + new - found.shape[1]
    return np.pad(found, ((0, 0), (0, free)), constant_values=pad)


def program(folder, name):
    call = export.deserialize(bytearray((folder / f"{name}.jax").read_bytes())).call
    return partial(call, load_file(folder / "weights.safetensors"))


@pytest.mark.parametrize("case", tiered(SETTINGS, lambda case: case != "greedy"))
def test_an_exported_program_computes_what_the_model_does(folder, case, tmp_path):
    variant, settings = SETTINGS[case]
    model = LOAD(folder(ONE_LAYER[variant]))
    settings = {"max_new_tokens": 10, "eos_token_id": None, **settings}
    export_stablehlo(model, tmp_path, max_prompt=12, **settings)
    seed = (np.int32(3),) if "do_sample" in settings else ()
    for lengths in ([7, 3], [1, 12, 9])[: 2 if case == "greedy" else 1]:
        ids, mask = prompts(model.config, lengths)
        found = program(tmp_path, "generate")(ids, mask, *seed)["sequences"]
        np.testing.assert_array_equal(found, expected(model, ids, mask, settings))


PLAIN = {"max_new_tokens": 10, "eos_token_id": None}


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """A model, and the folder of its greedy program, which stands in an earlier one's place."""
    model, home = LOAD(folder(ONE_LAYER["pre_ln"])), tmp_path_factory.mktemp("exported")
    (home / "generate.jax").write_bytes(b"an earlier export")
    export_stablehlo(model, home, max_prompt=12, **PLAIN)
    names = sorted(path.name for path in home.iterdir())
    assert names == ["forward.jax", "generate.jax", "weights.safetensors"]
    return model, home


def test_an_exported_program_needs_nothing_of_ours(exported):
    model, home = exported
    ids, mask = prompts(model.config, [2, 7])
    np.savez(home / "in.npz", ids=ids, mask=mask)
    code = "\n".join(line[4:] for line in SERVE.splitlines())
    command = [sys.executable, "-I", "-c", code]
    subprocess.run(command, cwd=home, check=True, capture_output=True)
    out = np.load(home / "out.npz")
    np.testing.assert_array_equal(out["ids"], expected(model, ids, mask, PLAIN))
    seen = np.cumsum(mask, 1) > 0
    logits = np.asarray(model(ids, attention_mask=mask).logits)
    np.testing.assert_allclose(out["logits"][seen], logits[seen], rtol=0, atol=ORACLE_TOLERANCE)


def test_an_exported_program_refuses_what_it_cannot_take(exported):
    model, home = exported
    generate, forward = (program(home, name) for name in ("generate", "forward"))
    ids, mask = prompts(model.config, [9, 5, 9, 9])
    good = np.array(generate(ids, mask)["sequences"])
    assert (good >= 0).all()
    ids[0, 4], ids[2, 8], mask[1, -1] = 99, -1, 0
    found = np.asarray(generate(ids, mask)["sequences"])
    np.testing.assert_array_equal(found[3], good[3])
    assert (found[:3] == -1).all()
    logits = np.asarray(forward(ids, mask)["logits"])
    assert np.isnan(logits[0, 4]).all()
    assert np.isnan(logits[2, 8]).all()
    assert np.isfinite(logits[3]).all()
    for length in (1, 13):
        with pytest.raises(ValueError, match=r"refining shapes|constraint"):
            generate(np.full((1, length), 5, np.int32), np.ones((1, length), np.int32))


def test_what_cannot_be_exported(folder, tmp_path, monkeypatch):
    model = LOAD(folder(ONE_LAYER["pre_ln"]))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "max_new_tokens: an export needs it"),
        ({"max_new_tokens": 3, "stop_strings": "x"}, "stop_strings cannot be exported"),
        ({"max_new_tokens": 505}, r"9 tokens and 505 new.*max_position_embeddings=512"),
    ]
    for settings, message in cases:
        with pytest.raises(GenerationError, match=message):
            export_stablehlo(model, tmp_path / "no", 9, **settings)
    with pytest.raises(GenerationError, match="max_prompt: expected an integer above 1"):
        export_stablehlo(model, tmp_path / "no", 1, max_new_tokens=3)
    with pytest.raises(ConfigError, match="on one device, received one on a mesh"):
        export_stablehlo(LOAD(folder(ONE_LAYER["pre_ln"]), mesh=sharding.make_mesh(1)), tmp_path, 9)
    monkeypatch.setattr(model.get_decoder(), "implementation", "flash_attention_2")
    with pytest.raises(ConfigError, match='expected attn_implementation="sdpa"'):
        export_stablehlo(model, tmp_path / "no", 9, max_new_tokens=3)
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_stablehlo(model, tmp_path / "file", 9, max_new_tokens=3)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_flatbuffers_it_says_what_to_install(tmp_path, monkeypatch):
    """TensorFlow brings it, and hid that JAX' export needs it and does not ask for it."""
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    model = opt_flax.FlaxOPTForCausalLM(CONFIGS["pre_ln"])
    with pytest.raises(ConfigError, match="pip install flatbuffers"):
        export_stablehlo(model, tmp_path, 8, max_new_tokens=2)
