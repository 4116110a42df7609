"""Parameters outside of the model, as `transformers`' Flax models had them."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
from flax.core import freeze
from flax.traverse_util import flatten_dict

import opt_flax
from opt_core.errors import AbsentError, ConfigError, InputError, UnsupportedError
from opt_core.params import param_specs
from opt_flax import sharding
from opt_flax.checkpoint import get_parameter
from tests.support.configs import CONFIGS
from tests.support.flax_models import SILENT, logits_of, model_of
from tests.support.oracle import random_params
from tests.support.reference import make_prompts, reference, tensors

CONFIG = CONFIGS["post_ln"].replace(**SILENT, num_hidden_layers=1)


def differences(tree: Any, other: Any) -> float:
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(jnp.abs(a - b).max()) for a, b in pairs)


def test_the_tree_has_the_names_and_shapes_of_linen(folder):
    model, arrays = model_of(folder, CONFIG), random_params(CONFIG)
    leaves = flatten_dict(model.params, sep="/")
    assert set(leaves) >= {
        "model/decoder/embed_tokens/embedding", "model/decoder/layers/0/fc1/kernel",
        "model/decoder/layers/0/self_attn/q_proj/bias", "model/decoder/project_in/kernel",
        "model/decoder/layers/0/self_attn_layer_norm/scale",
    }  # fmt: skip
    assert len(leaves) == len(param_specs(CONFIG))
    np.testing.assert_array_equal(
        leaves["model/decoder/layers/0/fc1/kernel"], arrays["model.decoder.layers.0.fc1.weight"].T
    )
    assert model.required_params == set(flatten_dict(model.params))
    shapes = jax.tree.map(jnp.shape, model.params)
    assert jax.tree.map(lambda leaf: leaf.shape, model.params_shape_tree) == shapes
    assert set(model.model.params) == {"decoder"}
    heads = opt_flax.FlaxOPTForQuestionAnswering(CONFIG)
    assert set(heads.params["qa_outputs"]) == {"kernel", "bias"}


def test_a_call_with_parameters_is_pure(folder):
    """Gradients are those of transformers; the model itself stays as it was."""
    model, theirs = model_of(folder, CONFIG), reference(CONFIG)
    ids, params = make_prompts(CONFIG, 2, 7), freeze(model.params)
    other = jax.tree.map(lambda leaf: leaf * 1.5, params)
    before = model(ids).logits
    assert float(jnp.abs(model(ids, params=other).logits - before).max()) > 0.1
    np.testing.assert_array_equal(model(ids, params=params, train=False).logits, before)
    np.testing.assert_array_equal(model(ids).logits, before)

    def loss(params: Any) -> Any:
        return model(ids, params=params, labels=ids, train=True, dropout_rng=key).loss

    key = jax.random.PRNGKey(0)
    value, gradients = jax.jit(jax.value_and_grad(loss))(params)
    theirs.requires_grad_(True)
    expected = theirs(**tensors({"input_ids": ids, "labels": ids})).loss
    expected.backward()
    assert value == pytest.approx(expected.item(), abs=1e-5)
    found: dict[str, Any] = flatten_dict(gradients, sep="/")  # type: ignore[assignment]
    for name, leaf in theirs.model.decoder.layers[0].named_parameters():
        if not name.endswith(("k_proj.bias", "layer_norm.weight", "layer_norm.bias")):
            path = "model/decoder/layers/0/" + name.replace(".", "/").replace("weight", "kernel")
            np.testing.assert_allclose(found[path], leaf.grad.numpy().T, rtol=1e-4, atol=1e-6)


def test_dropout_follows_its_key(folder):
    model = model_of(folder, CONFIG.replace(dropout=0.5))
    ids, params = make_prompts(CONFIG, 2, 7), model.params

    @jax.jit
    def run(seed: Any) -> Any:
        key = jax.random.PRNGKey(seed)
        return model(ids, params=params, dropout_rng=key, train=True).logits

    np.testing.assert_array_equal(run(0), run(0))
    assert float(jnp.abs(run(0) - run(1)).max()) > 0.1


@pytest.mark.parametrize("options", [{"scan_layers": True}, {"mesh": (1, 2, 2)}], ids=str)
def test_stacked_and_spread_models_have_the_same_tree(folder, options):
    config = CONFIGS["pre_ln"].replace(num_hidden_layers=2)  # which could be mixed up
    if "mesh" in options:
        options = {"mesh": sharding.make_mesh(*options["mesh"])}
    plain, other = model_of(folder, config), model_of(folder, config, **options)
    assert differences(plain.params, other.params) == 0
    params = jax.tree.map(lambda leaf: np.asarray(leaf) * 2, plain.params)
    assert differences(other.with_params(params).params, params) == 0
    other.params = params
    assert differences(other.params, params) == 0


def test_parameters_are_set_and_saved(folder, tmp_path):
    model = model_of(folder, CONFIG)
    params = jax.tree.map(lambda leaf: leaf + 1, model.params)
    model.save_pretrained(tmp_path / "other", params=params)
    assert differences(model_of(lambda _: tmp_path / "other").params, params) == 0
    assert differences(model.params, params) > 0
    model.params = freeze(params)
    assert differences(model.params, params) == 0
    np.testing.assert_array_equal(
        get_parameter(model, param_specs(CONFIG)[0]),
        params["model"]["decoder"]["embed_tokens"]["embedding"],
    )
    decoder = params["model"]["decoder"]
    for tree, message in (
        ({}, "params: 20 missing, such as model/decoder/embed_pos"),
        (params | {"x": {"y": 1}}, "params: 1 unknown, such as x/y"),
        ({"model": {"decoder": decoder | {"embed_tokens": {"embedding": jnp.ones(3)}}}},
         r"model/decoder/embed_tokens/embedding: expected shape \(99, 24\), received \(3,\)"),
        (3, "params: expected a dict, received int"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            model.params = tree


def test_types_are_cast_where_the_mask_says_so(folder):
    model = opt_flax.FlaxOPTForCausalLM(CONFIG, _do_init=False)
    params = {"fc1": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "steps": jnp.arange(3)}

    def kinds(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.dtype.name, tree)

    for cast, dtype in ((model.to_bf16, "bfloat16"), (model.to_fp16, "float16")):
        half = cast(params)
        assert kinds(half) == {"fc1": {"kernel": dtype, "bias": dtype}, "steps": "int32"}
        assert kinds(model.to_fp32(half)) == kinds(params)
    mask = jax.tree.map(lambda leaf: leaf.ndim == 2, params)
    assert kinds(model.to_bf16(params, mask)["fc1"]) == {"kernel": "bfloat16", "bias": "float32"}
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), model.params_shape_tree
    )
    call: Any = model
    run = jax.eval_shape(lambda p: call(make_prompts(CONFIG, 2, 7), params=p).logits, shapes)
    assert run.dtype == jnp.bfloat16


def test_fresh_parameters_follow_the_key():
    model = opt_flax.FlaxOPTForCausalLM(CONFIG, input_shape=(1, 1), seed=0, _do_init=False)
    with pytest.raises(ConfigError, match="_do_init=False and has no parameters; pass params="):
        _ = model.params
    with pytest.raises(ConfigError, match="_do_init=False and has no parameters; pass params="):
        model(make_prompts(CONFIG, 2, 7))
    key = jax.random.PRNGKey(7)
    params = model.init_weights(key, (1, 1))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(
        lambda leaf: leaf.shape, model.params_shape_tree
    )
    table = params["model"]["decoder"]["embed_tokens"]["embedding"]
    assert 0.8 < float(table.std()) / CONFIG.init_std < 1.2
    assert not table[CONFIG.pad_token_id].any()
    assert differences(params, model.init_weights(key)) == 0
    assert differences(params, model.init_weights(jax.random.PRNGKey(8))) > 0
    shapes = jax.eval_shape(model.init_weights, key)
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(jnp.shape, params)
    part = {"model": {"decoder": {"embed_tokens": {"embedding": table + 1}}}}
    filled = model.init_weights(key, (1, 1), part)
    assert differences(filled["model"]["decoder"]["embed_tokens"]["embedding"], table + 1) == 0


def test_parameters_come_apart_when_they_are_loaded(folder):
    ids = make_prompts(CONFIG, 2, 7)
    load: Any = opt_flax.FlaxOPTForCausalLM.from_pretrained
    model, params = load(folder(CONFIG), _do_init=False)
    np.testing.assert_array_equal(
        model(ids, params=params).logits, model_of(folder, CONFIG)(ids).logits
    )
    with pytest.raises(ConfigError, match="pass params="):
        model(ids)
    with pytest.warns(UserWarning, match="^dtype=bfloat16: the weights are made in it; in transf"):
        made = opt_flax.FlaxOPTForCausalLM(CONFIG, dtype=jnp.bfloat16)
    assert made.dtype == jnp.bfloat16


def test_linen_modules_are_refused_by_name():
    for home in (opt_flax, opt_flax.modeling):
        with pytest.raises(UnsupportedError, match=r"FlaxOPTModule .* FlaxOPTModel is an nnx"):
            _ = home.FlaxOPTModule
        with pytest.raises(AttributeError, match="no attribute 'FlaxOPTModul'"):
            _ = home.FlaxOPTModul
    with pytest.raises(UnsupportedError, match="FlaxOPTForCausalLM is an nnx"):
        from opt_flax import FlaxOPTForCausalLMModule  # noqa: F401
    with pytest.raises(UnsupportedError, match=r"\.module is not supported: no linen module"):
        _ = opt_flax.FlaxOPTModel(CONFIG).module


@pytest.mark.parametrize("padded", [0, 2])
def test_a_scan_carries_a_fresh_cache(folder, padded):
    """With a mask of all slots in each call, as `transformers` has it, and without one."""
    model = model_of(folder, CONFIG)
    ids = make_prompts(CONFIG, 2, 5)
    mask = np.ones((2, 9), np.int32)
    mask[0, :padded] = 0
    given = {"attention_mask": jnp.asarray(mask)} if padded else {}

    def step(cache: Any, token_B: Any) -> Any:
        out = model(token_B[:, None], past_key_values=cache, **given)
        return out.past_key_values, out.logits[:, 0]

    _, found = jax.lax.scan(step, model.init_cache(2, 9), jnp.asarray(ids).T)
    expected = logits_of(model, ids, mask[:, :5])
    assert differences(jnp.swapaxes(found, 0, 1)[:, padded:], expected[:, padded:]) < 1e-5


def test_linens_attributes_are_refused(folder):
    model = model_of(folder, CONFIG)
    for name in ("module_class", "key", "load_flax_weights", "_cast_floating_to", "to"):
        for owner in (model, type(model)):
            assert not hasattr(owner, name)
            with pytest.raises(AbsentError, match=rf"{type(model).__name__}\.{name} is not supp"):
                getattr(owner, name)


def test_results_are_replaced_and_alike_without_jit(folder):
    model, ids, names = model_of(folder, CONFIG), make_prompts(CONFIG, 2, 7), []
    out = jax.jit(model)(ids)
    assert out.replace(logits=out.logits * 2).logits[0, 0, 0] == 2 * out.logits[0, 0, 0]
    with jax.disable_jit():  # of shapes alone: nothing is computed
        jax.eval_shape(lambda: names.append(list(model(ids))))
    assert names == [list(out)] == [["logits"]]
    made = opt_flax.compatibility.Sequences(jnp.asarray(ids))
    np.testing.assert_array_equal(made.replace(sequences=ids + 1).sequences, ids + 1)
