"""What only TensorFlow has: Keras' training and files, policies, compiled programs, XLA."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import keras
import tensorflow as tf

from opt_core import OPTConfig, TrainConfig
from opt_core.dialects import KERAS
from opt_core.errors import CheckpointError, ConfigError, InputError
from opt_core.params import param_specs
from opt_tf import training
from opt_tf.checkpoint import locate
from tests.configs import CONFIGS
from tests.reference import make_mask, make_prompts

ROOT = Path(__file__).parents[1]
QUIET = CONFIGS["pre_ln"].replace(dropout=0.0)
EOS = list(range(40, 50))


def model_of(folder, variant: str | OPTConfig = "pre_ln", **options):
    return opt_tf.TFOPTForCausalLM.from_pretrained(folder(variant), **options)


def python(code: str, backend: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a program in another process, in the project's folder."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": backend or ""}
    if backend is None:
        del environment["KERAS_BACKEND"]
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip


IMPORTS = {
    "unset": ("import opt_tf, keras; print(keras.config.backend())", None, "tensorflow"),
    "tensorflow": ("import keras, opt_tf; print('fine')", "tensorflow", "fine"),
    "env": ("import opt_tf", "jax", "KERAS_BACKEND is 'jax'"),
    "loaded": ("import keras, opt_tf", "torch", "KERAS_BACKEND is 'torch'"),
    "old": (
        "import keras; keras.__version__ = '3.9.2'; import opt_tf", "tensorflow",
        "opt_tf needs Keras >= 3.15 and < 4, found 3.9.2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", IMPORTS)
def test_keras_is_told_or_must_be_told_to_use_tensorflow(case):
    code, backend, expected = IMPORTS[case]
    result = python(
        f"""
        from opt_core.errors import ConfigError
        try:
            {code}
        except ConfigError as error:
            print(error)
        """,
        backend,
    )
    assert expected in result.stdout, result.stderr
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize("variant", CONFIGS)
def test_variables_are_named_by_the_dialect(folder, variant):
    config = CONFIGS[variant]
    model = model_of(folder, variant)
    specs = param_specs(config)
    for spec in specs:
        path = KERAS.path(spec)
        assert locate(model, spec).path.replace("blocks_", "blocks/") == "/".join(path)
        assert tuple(locate(model, spec).shape) == KERAS.shape(spec)
    assert len(specs) == len(model.trainable_variables)
    assert model.num_parameters() == sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    block = model.model.decoder.blocks[0]
    assert block.self_attn.q_proj.kernel.shape == (32, 32)
    assert block.final_layer_norm.epsilon == 1e-5


def test_weight_decay_follows_the_parameter_list(folder):
    model = model_of(folder, "post_ln")
    optimizer = training.make_optimizer(model, TrainConfig())
    for spec in param_specs(model.config):
        assert optimizer._use_weight_decay(locate(model, spec).value) == spec.decays, spec.name


# Keras' training.


def history_of(model, *data, **options):
    return model.fit(*data, epochs=3, batch_size=4, verbose=0, shuffle=False, **options).history


def test_ids_alone_are_labels_too(folder):
    ids = make_prompts(QUIET, 8, 12)
    histories = []
    for data in (
        (ids,),
        ({"input_ids": ids},),
        ({"input_ids": ids, "attention_mask": np.ones_like(ids)},),
        ({"input_ids": ids, "labels": ids},),
        (ids, ids),
        (tf.data.Dataset.from_tensor_slices(ids).batch(4),),
        (tf.data.Dataset.from_tensor_slices({"input_ids": ids, "labels": ids}).batch(4),),
    ):
        model = model_of(folder, QUIET)
        model.compile(optimizer=keras.optimizers.Adam(1e-3))
        batch = {} if isinstance(data[0], tf.data.Dataset) else {"batch_size": 4}
        fitted = model.fit(*data, epochs=3, verbose=0, shuffle=False, **batch)
        histories.append(fitted.history["loss"])
    assert histories[0][-1] < histories[0][0] - 0.1
    for history in histories[1:]:
        np.testing.assert_allclose(history, histories[0], rtol=1e-5)


def test_padding_is_no_label(folder):
    ids, mask = make_prompts(QUIET, 4, 9), make_mask("right", [9, 4, 7, 2])
    model = model_of(folder, QUIET)
    model.compile()
    given = model.evaluate({"input_ids": ids, "attention_mask": mask}, verbose=0)
    labels = np.where(mask, ids, -100)
    expected = model(ids, attention_mask=mask, labels=labels).loss
    np.testing.assert_allclose(given, expected, rtol=1e-5)


def test_a_loss_of_keras_sees_the_logits(folder):
    ids = make_prompts(QUIET, 8, 12)
    following = np.roll(ids, -1, 1)
    model = model_of(folder, QUIET)
    model.compile(
        optimizer="adam",
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    history = history_of(model, ids, following, sample_weight=np.ones((8, 12)))
    assert history["loss"][-1] < history["loss"][0]
    assert 0 <= history["accuracy"][-1] <= 1
    model = model_of(folder, QUIET)
    model.compile(optimizer="adam")
    with pytest.raises(InputError, match="sample_weight needs a loss"):
        history_of(model, ids, following, sample_weight=np.ones((8, 12)))


def test_heads_are_fitted(folder):
    ids = make_prompts(QUIET, 8, 9)
    head = "sequence_classification"
    model = opt_tf.TFOPTForSequenceClassification.from_pretrained(folder(QUIET, head))
    model.compile(optimizer=keras.optimizers.Adam(1e-3), metrics=["accuracy"])
    history = history_of(model, ids, ids[:, 3] % 2)
    assert history["loss"][-1] < history["loss"][0]
    assert "accuracy" in history
    assert model.predict(ids, verbose=0).shape == (8, 2)
    with pytest.raises(InputError, match="expected labels among the inputs or as y"):
        history_of(model, ids)
    answers = opt_tf.TFOPTForQuestionAnswering.from_pretrained(folder(QUIET, "question_answering"))
    answers.compile(optimizer=keras.optimizers.Adam(1e-3))
    starts = ids[:, 3] % 9
    inputs = {"input_ids": ids, "start_positions": starts, "end_positions": starts}
    history = history_of(answers, inputs)
    assert history["loss"][-1] < history["loss"][0]
    np.testing.assert_allclose(
        answers.evaluate(ids, (starts, starts), verbose=0),
        answers.evaluate(inputs, verbose=0),
        rtol=1e-5,
    )
    plain = opt_tf.TFOPTModel.from_pretrained(folder(QUIET, "none"))
    plain.compile(optimizer="adam")
    with pytest.raises(InputError, match="TFOPTModel has no loss of its own"):
        history_of(plain, ids)


def test_predict_gives_the_logits(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 5, 9)
    logits = model.predict(ids, batch_size=2, verbose=0)
    assert isinstance(logits, np.ndarray)
    np.testing.assert_allclose(logits, model(ids).logits, rtol=0, atol=2e-5)
    answers = opt_tf.TFOPTForQuestionAnswering(QUIET)
    assert [x.shape for x in answers.predict(ids, verbose=0)] == [(5, 9)] * 2


def test_our_optimizer_trains_in_keras_as_in_fit(folder):
    """One epoch of Keras' fit is `training.fit`: the same optimizer, clipping and decay."""
    config = TrainConfig(max_steps=3, learning_rate=1e-3, lr_schedule="constant", max_grad_norm=0.5)
    ids = make_prompts(QUIET, 12, 10)
    ours, kerases = model_of(folder, QUIET), model_of(folder, QUIET)
    training.fit(ours, iter(np.split(ids, 3)), config)
    kerases.compile(optimizer=training.make_optimizer(kerases, config))
    kerases.fit(ids, batch_size=4, shuffle=False, verbose=0)
    for a, b in zip(ours.trainable_variables, kerases.trainable_variables, strict=True):
        if not a.path.endswith("k_proj/bias"):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-5, err_msg=a.path)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_policies(folder, policy):
    ids = make_prompts(QUIET, 8, 12)
    model = model_of(folder, QUIET, dtype=policy)
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert model(ids).logits.dtype == policy.removeprefix("mixed_")
    full = model_of(folder, QUIET)(ids, labels=ids)
    half = model(ids, labels=ids)
    assert half.loss.dtype == "float32"
    np.testing.assert_allclose(half.loss, full.loss, rtol=0.02)
    model.compile(optimizer=keras.optimizers.Adam(1e-3))
    history = history_of(model, ids)
    assert history["loss"][-1] < history["loss"][0] - 0.1
    out = model.generate(ids, max_new_tokens=4, eos_token_id=None)
    assert out.shape == (8, 16)


def test_the_global_policy_is_kerases(folder):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        model = opt_tf.TFOPTForCausalLM(QUIET)
        assert (model.compute_dtype, model.variable_dtype) == ("bfloat16", "float32")
        assert model.model.decoder.blocks[0].fc1.compute_dtype == "bfloat16"
        assert model_of(folder).compute_dtype == "float32"
    finally:
        keras.config.set_dtype_policy("float32")


# Training mode.


def test_dropout_is_on_in_training_only(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 9)
    still = model(ids).logits
    np.testing.assert_array_equal(model(ids, training=False).logits, still)
    seeds = model.get_decoder().dropout_seeds.state
    seeds.assign([3, 0])
    first, second = (model(ids, training=True).logits.numpy() for _ in range(2))
    assert np.abs(first - second).max() > 0.1
    seeds.assign([3, 0])
    np.testing.assert_array_equal(model(ids, training=True).logits, first)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("where", ["dropout", "attention_dropout", "layerdrop"])
def test_each_dropout_field_acts(folder, where, attention):
    silent = {"dropout": 0.0, "attention_dropout": 0.0, "layerdrop": 0.0}
    config = CONFIGS["pre_ln"].replace(**{**silent, where: 0.5})
    model = model_of(folder, config, attn_implementation=attention)
    ids = make_prompts(config, 1, 9)
    model.get_decoder().dropout_seeds.state.assign([1, 0])
    outputs = np.stack([model(ids, training=True).logits for _ in range(12)])
    assert outputs.std(0).max() > 0.01
    quiet = model_of(folder, config.replace(**silent))(ids, training=True).logits
    assert np.abs(outputs.mean(0) - quiet).max() < 6 * outputs.std(0).max()


def gradients_of(model, ids, compiled):
    def run(ids):
        with tf.GradientTape() as tape:
            loss = model(ids, labels=ids, training=True).loss
        return tape.gradient(loss, model.trainable_variables)

    model.get_decoder().dropout_seeds.state.assign([7, 0])
    run = tf.function(run, jit_compile=compiled) if compiled is not None else run
    return [tf.convert_to_tensor(g).numpy() for g in run(tf.constant(ids))]


@pytest.mark.parametrize("compiled", [None, False, True], ids=["eager", "graph", "xla"])
def test_gradient_checkpointing_changes_no_gradient(folder, compiled):
    ids = make_prompts(CONFIGS["galactica"], 2, 9)
    model = model_of(folder, "galactica")
    expected = gradients_of(model, ids, compiled)
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients_of(model, ids, compiled), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert not model.get_decoder().gradient_checkpointing


def test_gradient_checkpointing_really_recomputes(folder, monkeypatch):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 4)
    fc1, calls = model.get_decoder().blocks[0].fc1, []
    inner = fc1.call
    monkeypatch.setattr(fc1, "call", lambda *a, **k: (calls.append(1), inner(*a, **k))[1])
    gradients_of(model, ids, None)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    gradients_of(model, ids, None)
    assert len(calls) == 3


# Types and files.


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("variant", CONFIGS)
def test_half_precision_is_near_and_finite(folder, variant, dtype):
    ids, mask = make_prompts(CONFIGS[variant], 3, 9), make_mask("left", [9, 5, 2])
    half = model_of(folder, variant, dtype=dtype)
    assert {v.dtype for v in half.trainable_variables} == {dtype}
    logits = tf.cast(half(ids, attention_mask=mask).logits, tf.float32).numpy()
    full = model_of(folder, variant)(ids, attention_mask=mask).logits.numpy()
    assert np.isfinite(logits).all()
    assert np.abs(logits - full)[mask > 0].max() < (0.8 if dtype == "bfloat16" else 0.1)


def test_dtype_auto_is_the_stored_one(folder, tmp_path):
    model_of(folder, dtype=tf.bfloat16).save_pretrained(tmp_path)
    loaded = opt_tf.TFOPTForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == "bfloat16"
    assert model_of(folder, dtype="float64")([[2, 5]]).logits.dtype == tf.float64
    with pytest.raises(ConfigError, match="dtype: expected one of"):
        opt_tf.TFOPTForCausalLM.from_pretrained(tmp_path, dtype="fp16")


def test_values_beyond_float16_are_refused(folder, tmp_path):
    model = model_of(folder)
    kernel = model.get_decoder().blocks[0].fc2.kernel
    kernel.assign(kernel * 1e8)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.fc2\.weight: values beyond the range"):
        opt_tf.TFOPTForCausalLM.from_pretrained(tmp_path, dtype="float16")


def test_a_fresh_head_warns(folder):
    config = CONFIGS["pre_ln"].replace(num_labels=5)
    with pytest.warns(UserWarning, match=r"no score\.weight in this checkpoint"):
        model = opt_tf.TFOPTForSequenceClassification.from_pretrained(
            folder("pre_ln"), config=config
        )
    assert model.score.kernel.shape == (32, 5)
    assert 0 < np.std(model.score.kernel) < 0.1


@pytest.mark.parametrize("variant", [*CONFIGS, "untied"])
def test_keras_files_keep_everything(folder, variant, tmp_path):
    config = CONFIGS.get(variant) or CONFIGS["pre_ln"].replace(tie_word_embeddings=False)
    model, ids = model_of(folder, config, attn_implementation="eager"), make_prompts(config, 2, 9)
    model.generation_config = model.generation_config.replace(eos_token_id=(5, 6), max_length=30)
    expected = model(ids).logits
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(ids).logits, expected)
    assert loaded.config == model.config
    assert loaded.generation_config == model.generation_config
    assert loaded.attn_implementation == "eager"
    model.save_weights(tmp_path / "model.weights.h5")
    other = opt_tf.TFOPTForCausalLM(config, seed=5)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other(ids).logits, expected, rtol=0, atol=2e-5)


def test_a_trained_model_goes_on_where_it_was_saved(folder, tmp_path):
    """The optimizer's state and rules travel in the .keras file."""
    ids = make_prompts(QUIET, 8, 9)
    model = model_of(folder, QUIET)
    model.compile(optimizer=training.make_optimizer(model, TrainConfig(learning_rate=1e-3)))
    model.fit(ids, batch_size=4, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for each in (model, loaded):
        each.fit(ids, batch_size=4, verbose=0, shuffle=False)
    for a, b in zip(loaded.trainable_variables, model.trainable_variables, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6, err_msg=a.path)


def test_keras_functional_models_can_contain_ours(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 9)
    inputs = keras.Input((None,), dtype="int32")
    outer = keras.Model(inputs, keras.ops.argmax(model(inputs).logits, -1))
    np.testing.assert_array_equal(outer(ids), tf.argmax(model(ids).logits, -1))


# Compiled programs.


def traces(model):
    return {
        key[0].__name__: f.experimental_get_tracing_count() for key, f in model.programs.items()
    }


def test_another_prompt_or_setting_compiles_nothing(folder):
    model = model_of(folder)
    settings = {"eos_token_id": None, "do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1}
    for length, changes in (
        (5, {"seed": 1, "temperature": 0.7}),
        (9, {"seed": 2, "temperature": 1.3, "top_p": 0.5}),
        (30, {"temperature": 0.5, "repetition_penalty": 1.4, "max_new_tokens": 33}),
        (12, {"temperature": 0.6, "attention_mask": make_mask("left", [12, 4])}),
    ):
        ids = make_prompts(model.config, 2, length)
        model.generate(ids, **{"max_new_tokens": 40, **settings, **changes})
    assert traces(model) == {"_start": 1, "_loop": 1}
    list(model.stream(make_prompts(model.config, 2, 5), max_new_tokens=40, **settings, seed=4,
                      temperature=3.0))  # fmt: skip
    list(model.stream(make_prompts(model.config, 2, 9), max_new_tokens=35, **settings, seed=4,
                      temperature=2.0))  # fmt: skip
    assert traces(model) == {"_start": 1, "_loop": 1, "_step": 1}
    model.generate(make_prompts(model.config, 3, 9), max_new_tokens=40, temperature=2.0, **settings)
    assert traces(model) == {"_start": 2, "_loop": 2, "_step": 1}


def test_generation_follows_the_weights(folder):
    """Programs read the weights anew: none is kept inside them."""
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 5)
    settings = {"max_new_tokens": 8, "eos_token_id": None}
    before = model.generate(ids, **settings).numpy()
    other = opt_tf.TFOPTForCausalLM(CONFIGS["pre_ln"], seed=4)
    for a, b in zip(model.trainable_variables, other.trainable_variables, strict=True):
        a.assign(b)
    after = model.generate(ids, **settings).numpy()
    np.testing.assert_array_equal(after, other.generate(ids, **settings))
    assert (before != after).any()


def test_a_cache_may_be_continued_twice(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 1, 6)
    first = model(ids[:, :4], past_key_values=model.init_cache(1, 10)).past_key_values
    once, again = (model(ids[:, 4:], past_key_values=first).logits for _ in range(2))
    np.testing.assert_array_equal(once, again)


def test_caches_go_through_functions_of_tensorflow(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 2, 6)
    run = tf.function(lambda ids, cache: model(ids, past_key_values=cache))
    first = run(tf.constant(ids[:, :4]), model.init_cache(2, 8))
    assert isinstance(first, opt_tf.TFOPTOutput)
    assert first.past_key_values.length == 4
    second = run(tf.constant(ids[:, 4:]), first.past_key_values)
    np.testing.assert_allclose(second.logits, model(ids).logits[:, 4:], rtol=0, atol=2e-5)


def test_any_shape_can_be_traced_at_once(folder):
    model = model_of(folder)
    run = tf.function(
        lambda ids, mask: model(ids, attention_mask=mask, labels=ids),
        input_signature=[tf.TensorSpec((None, None), tf.int32)] * 2,
    )
    for batch, length in ((2, 5), (3, 9)):
        ids, mask = make_prompts(model.config, batch, length), np.ones((batch, length), int)
        mask[0, :2] = 0
        out, eager = run(ids.astype(np.int32), mask), model(ids, attention_mask=mask, labels=ids)
        np.testing.assert_allclose(out.logits, eager.logits, rtol=0, atol=2e-5)
        np.testing.assert_allclose(out.loss, eager.loss, rtol=1e-5)
