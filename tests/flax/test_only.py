"""What only Flax has: transformations, compiled programs, stacked layers and explicit dropout."""

import math
import warnings
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

import opt_flax  # noqa: E402
from opt_core.config import OPTConfig  # noqa: E402
from opt_core.errors import CheckpointError, ConfigError  # noqa: E402
from opt_core.params import param_specs  # noqa: E402
from opt_core.training.config import TrainConfig  # noqa: E402
from opt_flax import beam, checkpoint, generation, linear, speculative, training  # noqa: E402
from tests.support.backends import GRADIENT_TOLERANCE, ORACLE_TOLERANCE  # noqa: E402
from tests.support.configs import CONFIGS  # noqa: E402
from tests.support.reference import make_mask, make_prompts  # noqa: E402

SILENT = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}


STEP: Any = training._step
MODEL: Any = opt_flax.FlaxOPTForCausalLM


def model_of(folder, variant: str | OPTConfig = "pre_ln", **options) -> Any:
    return MODEL.from_pretrained(folder(variant), **options)


def close(ours, theirs, atol=ORACLE_TOLERANCE):
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=0, atol=atol)


def close_gradients(ours, theirs):
    # The gradient of k_proj.bias is zero: what is there is rounding noise of 1e-7.
    close(ours, theirs, max(GRADIENT_TOLERANCE * float(jnp.abs(theirs).max()), 3e-7))


def gradients(model, ids, **options):
    return nnx.grad(lambda m: m(ids, labels=ids, **options).loss)(model)


@pytest.mark.parametrize("variant", CONFIGS)
def test_transformations_change_nothing(folder, variant):
    model = model_of(folder, variant)
    ids, mask = make_prompts(CONFIGS[variant], 3, 9), make_mask("left", [9, 5, 2])
    expected = model(ids, attention_mask=mask).logits
    close(nnx.jit(lambda m, i, k: m(i, attention_mask=k).logits)(model, ids, mask), expected)
    graph, state = nnx.split(model)
    pure = jax.jit(lambda state, i, k: nnx.merge(graph, state)(i, attention_mask=k).logits)
    close(pure(state, ids, mask), expected)
    one = jax.vmap(lambda i, k: nnx.merge(graph, state)(i[None], attention_mask=k[None]).logits[0])
    close(one(jnp.asarray(ids), jnp.asarray(mask)), expected)


def test_gradients_can_be_taken_inside_jit(folder):
    config = CONFIGS["pre_ln"].replace(**SILENT)
    model, ids = model_of(folder, config), make_prompts(config, 2, 9)
    plain = gradients(model, ids)
    jitted = nnx.jit(gradients)(model, jnp.asarray(ids))
    for a, b in zip(jax.tree.leaves(jitted), jax.tree.leaves(plain), strict=True):
        close_gradients(a, b)


def test_outputs_and_caches_cross_jit(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 6)
    step = nnx.jit(lambda m, i, cache: m(i, past_key_values=cache))
    first = step(model, ids[:, :4], model.init_cache(2, 9))
    second = step(model, ids[:, 4:], first.past_key_values)
    close(second.logits, model(ids).logits[:, 4:])
    assert int(second.past_key_values.length) == 6
    # The same cache again, outside: arrays are values.
    again = model(ids[:, 4:], past_key_values=first.past_key_values)
    close(again.logits, second.logits)


def compiled():
    """Programs compiled so far for generation."""
    return {
        f"{module.__name__}.{name}": getattr(module, name)._cache_size()
        for module in (generation, beam)
        for name in ("_start", "_step", "_loop")
        if hasattr(module, name)
    }


SAMPLED = {"do_sample": True, "eos_token_id": None, "repetition_penalty": 1.3, "top_p": 0.8}


def test_one_program_per_bucket(folder):
    model = model_of(folder)

    def run(length, seed, padded=False, **settings):
        ids = make_prompts(CONFIGS["pre_ln"], 2, length, seed=seed)
        mask = make_mask("left", [length, length - 1]) if padded else None
        list(model.stream(ids, mask, seed=seed, **SAMPLED, **settings))
        model.generate(ids, mask, seed=seed, **SAMPLED, **settings)
        model.generate(ids, mask, num_beams=2, max_new_tokens=settings["max_new_tokens"])

    run(5, 1, temperature=0.5, max_new_tokens=6, min_new_tokens=2)
    before = compiled()
    run(9, 2, temperature=1.5, max_new_tokens=11, min_new_tokens=3)
    run(20, 2**40, temperature=1.0001, max_new_tokens=2, min_new_tokens=1)
    assert compiled() == before
    run(30, 3, temperature=2.0, max_new_tokens=5, min_new_tokens=1)  # 35 slots: the next bucket
    assert compiled() == {name: count + 1 for name, count in before.items()}
    before = compiled()
    run(9, 4, padded=True, temperature=0.5, max_new_tokens=6, min_new_tokens=2)
    assert compiled() == {name: count + 1 for name, count in before.items()}


def test_drafts_need_no_other_program(folder):
    """Another prompt, seed, temperature, or number of drafted tokens that are right."""
    model = model_of(folder)

    def run(ids, seed, temperature):
        settings = {**SAMPLED, "seed": seed, "temperature": temperature, "max_new_tokens": 12}
        model.generate(ids, prompt_lookup_num_tokens=3, **settings)
        model.generate(ids, assistant_model=model, num_assistant_tokens=2, **settings)

    def counts():
        names = ("_open", "_check", "_propose")
        return {name: getattr(speculative, name)._cache_size() for name in names}

    before = counts()
    run([[2, 5, 6, 5, 6]], 1, 0.5)
    # The prompts of model and draft; the blocks of lookup, found or not, and of the draft.
    most = {"_open": 2, "_check": 3, "_propose": 1}
    run([[2, 50, 51, 52, 53, 54]], 2, 5.0)
    after = counts()
    assert {name: after[name] - before[name] for name in after} == most
    run([[2, 7, 8, 9, 7, 8, 9, 7]], 2**40, 1.5)
    run([[2, 5, 6, 5]], 4, 0.1)
    assert counts() == after


def test_few_rows_are_multiplied_the_other_way_round_on_a_cpu():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(56, 32)), jnp.float32)
    most = linear.FEW_ROWS
    for shape in ((32,), (1, 32), (2, 32), (3, 2, 32), (11, 32), (most, 32), (most + 1, 32)):
        rows = jnp.arange(np.prod(shape), dtype=jnp.float32).reshape(shape) / 100
        few = np.prod(shape[:-1]) <= most
        close(linear.product(rows, weight), np.asarray(rows) @ np.asarray(weight).T, 2e-4)
        for platform in ("cpu", "tpu", "cuda"):
            traced = jax.jit(linear.product).trace(rows, weight)
            text = traced.lower(lowering_platforms=(platform,)).as_text()
            assert ("optimization_barrier" in text) == (few and platform == "cpu")
            is_single = math.prod(shape[:-1]) == 1
            assert ("8x7x32" in text) == (is_single and platform == "cpu")
            assert ("16x32" in text) == (shape == (11, 32) and platform == "cpu")


@pytest.mark.parametrize("variant", CONFIGS)
def test_stacked_layers_are_the_same_model(folder, variant, tmp_path):
    config = CONFIGS[variant].replace(**SILENT)
    flat, deep = (model_of(folder, config, scan_layers=scan) for scan in (False, True))
    ids, mask = make_prompts(config, 3, 9), make_mask("left", [9, 5, 2])
    wanted = {"output_hidden_states": True, "output_attentions": True, "attention_mask": mask}
    a, b = flat(ids, **wanted), deep(ids, **wanted)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        close(y, x)
    np.testing.assert_array_equal(*(m.generate(ids, mask, max_new_tokens=20) for m in (flat, deep)))
    left, right = (gradients(m, ids, attention_mask=mask) for m in (flat, deep))
    nnx.update(flat, left)
    nnx.update(deep, right)
    for spec in param_specs(config):
        x, y = (checkpoint.get_parameter(m, spec) for m in (flat, deep))
        close_gradients(y, x)
    deep.save_pretrained(tmp_path)
    for path in (tmp_path, folder(config)):
        same = MODEL.from_pretrained(path, scan_layers=True)
        one = same.get_decoder().layers.fc1.weight
        assert one.shape == (config.num_hidden_layers, 56, 32)
        first = param_specs(config)[-3]
        checkpoint.set_parameter(same, first, np.full(first.shape, 7, np.float32))
        assert (np.asarray(checkpoint.get_parameter(same, first)) == 7).all()


def test_stacked_layers_compile_once(folder):
    """The program of a deep model is no longer than that of a shallow one."""
    lengths = []
    for layers in (2, 6):
        config = CONFIGS["pre_ln"].replace(num_hidden_layers=layers)
        model = MODEL(config, seed=0, scan_layers=True)
        graph, state = nnx.split(model)
        ids = jnp.zeros((1, 4), jnp.int32)
        text = jax.jit(lambda state, i, graph=graph: nnx.merge(graph, state)(i).logits)
        lengths.append(len(text.lower(state, ids).as_text().splitlines()))
    assert lengths[0] == lengths[1]


def test_dropout_is_on_in_training_mode_only(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 9)
    still = model(ids).logits
    close(model(ids).logits, still, 0)
    model.train()
    first, second = model(ids).logits, model(ids).logits
    assert np.abs(first - second).max() > 0.1
    close(model(ids, deterministic=True).logits, still, 0)
    a, b = (model(ids, rngs=nnx.Rngs(dropout=5)).logits for _ in range(2))
    close(a, b, 0)
    model.eval()
    close(model(ids).logits, still, 0)
    c = model(ids, deterministic=False, rngs=nnx.Rngs(5)).logits
    assert np.abs(c - still).max() > 0.1


@pytest.mark.parametrize("attention_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("where", SILENT)
def test_each_dropout_field_acts(folder, where, attention_implementation):
    config = CONFIGS["pre_ln"].replace(**{**SILENT, where: 0.5})
    model = model_of(folder, config, attn_implementation=attention_implementation)
    model.train()
    ids = make_prompts(config, 1, 9)
    run = nnx.jit(lambda m: m(ids).logits)
    outputs = np.stack([run(model) for _ in range(12)])
    assert outputs.std(0).max() > 0.01
    quiet = model_of(folder, config.replace(**SILENT))
    quiet.train()
    assert np.abs(outputs.mean(0) - quiet(ids).logits).max() < 6 * outputs.std(0).max()


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "bare"])
def test_long_texts_in_pieces_are_the_whole(folder, padded):
    """What "sdpa" leaves out on a CPU is what its mask hides."""
    ids, mask = make_prompts(CONFIGS["pre_ln"], 2, 301), make_mask("left", [301, 140])
    mask = mask if padded else np.ones_like(mask)
    labels, found = np.where(mask, ids, -100), []
    if padded:
        labels[1, -140] = -100  # nothing but padding foretells it
    for kind in ("sdpa", "eager"):
        model = model_of(folder, attn_implementation=kind)
        model.eval()
        given = {"attention_mask": mask} if padded else {}
        gradient = nnx.grad(lambda m, given=given: m(ids, labels=labels, **given).loss)(model)
        query = gradient["model"]["decoder"]["layers"][0]["self_attn"]["q_proj"]["weight"][...]
        found.append((np.asarray(model(ids, **given).logits)[mask > 0], np.asarray(query)))
    (logits, slope), (theirs, other) = found
    np.testing.assert_allclose(logits, theirs, rtol=0, atol=ORACLE_TOLERANCE)
    np.testing.assert_allclose(slope, other, rtol=0, atol=GRADIENT_TOLERANCE * np.abs(other).max())


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("variant", CONFIGS)
def test_gradient_checkpointing_changes_no_gradient(folder, variant, scan):
    ids = make_prompts(CONFIGS[variant], 2, 9)
    found = []
    for recompute in (False, True):
        model = model_of(folder, variant, scan_layers=scan)
        model.train()
        if recompute:
            model.gradient_checkpointing_enable()
        graph, state = nnx.split(model)

        def loss(state, graph=graph):
            model = nnx.merge(graph, state)
            return model(ids, labels=ids, rngs=nnx.Rngs(dropout=3)).loss

        params, rest = nnx.split_state(state, nnx.Param, ...)
        grad = jax.grad(lambda p, r, loss=loss: loss(nnx.merge_state(p, r)))
        found.append(jax.jit(grad)(params, rest))
        assert ("remat" in str(jax.make_jaxpr(grad)(params, rest))) == recompute
        model.gradient_checkpointing_disable()
        assert not model.get_decoder().gradient_checkpointing
    for a, b in zip(*(jax.tree.leaves(x) for x in found), strict=True):
        close_gradients(a, b)


def test_generation_never_drops(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 5)
    expected = model.generate(ids, max_new_tokens=12)
    model.train()
    np.testing.assert_array_equal(model.generate(ids, max_new_tokens=12), expected)
    assert not model.get_decoder().deterministic


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_half_precision_is_near_and_finite(folder, variant, dtype):
    ids, mask = make_prompts(CONFIGS[variant], 3, 9), make_mask("left", [9, 5, 2])
    half = model_of(folder, variant, dtype=dtype)
    assert half.dtype == jnp.dtype(dtype)
    logits = half(ids, attention_mask=mask).logits.astype(jnp.float32)
    full = model_of(folder, variant)(ids, attention_mask=mask).logits
    assert jnp.isfinite(logits).all()
    seen = np.array(mask, bool)
    assert np.abs(logits - full)[seen].max() < (0.8 if dtype == "bfloat16" else 0.1)


def test_types_that_cannot_be_had(folder, tmp_path):
    with pytest.raises(ConfigError, match="JAX has float64 switched off"):
        model_of(folder, dtype="float64")
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        model_of(folder, dtype="fp16")
    model = model_of(folder)
    weight = model.get_decoder().layers[0].fc2.weight
    weight.set_value(weight[...] * 1e8)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc2\.weight: values beyond the range"):
        MODEL.from_pretrained(tmp_path, dtype="float16")


def test_dtype_auto_is_the_stored_one(folder, tmp_path):
    model_of(folder, dtype="bfloat16").save_pretrained(tmp_path)
    loaded = MODEL.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == jnp.bfloat16
    assert loaded.config.dtype == "bfloat16"
    assert MODEL.from_pretrained(tmp_path, dtype=jnp.float16).dtype == "float16"


def test_a_fresh_head_warns(folder):
    config = CONFIGS["pre_ln"].replace(num_labels=5)
    kind: Any = opt_flax.FlaxOPTForSequenceClassification
    with pytest.warns(
        UserWarning, match=r"no score\.weight in this checkpoint; it is freshly initialised"
    ):
        model = kind.from_pretrained(folder("pre_ln"), config=config)
    assert model.score.weight.shape == (5, 32)
    assert 0 < model.score.weight[...].std() < 0.1


def test_a_head_can_be_left_behind(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = folder("post_ln", "sequence_classification")
        model = MODEL.from_pretrained(path)
    assert math.isfinite(model(np.array([[2, 5, 6]]), labels=np.array([[2, 5, 6]])).loss)


def test_a_training_step_updates_in_place(folder):
    """The compiled step takes the model's arrays over and puts new ones in their places."""
    config = CONFIGS["pre_ln"]
    model, ids = model_of(folder, config), make_prompts(config, 2, 9)
    train = TrainConfig(max_steps=3, learning_rate=1e-2)
    optimizer = training.make_optimizer(model, train)
    model.train()
    compiled = STEP._cache_size()
    losses = [training.train_step(model, optimizer, ids, train, step)[0] for step in range(3)]
    assert losses[2] < losses[0]
    assert STEP._cache_size() == compiled + 1
    model.eval()
    assert math.isfinite(model(ids, labels=ids).loss)
