"""What only TensorFlow has: Keras' training and files, policies, compiled programs, XLA."""

import json
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import keras
import tensorflow as tf

from opt_core import OPTConfig, TrainConfig
from opt_core.dialects import KERAS
from opt_core.errors import CheckpointError, ConfigError, GenerationError, InputError
from opt_core.params import param_specs
from opt_tf import training
from opt_tf.checkpoint import locate
from opt_tf.export import export_saved_model, export_tflite
from tests.configs import CONFIGS
from tests.reference import make_mask, make_prompts

ROOT = Path(__file__).parents[1]
QUIET = CONFIGS["pre_ln"].replace(dropout=0.0)
EOS = list(range(40, 50))


def model_of(folder, variant: str | OPTConfig = "pre_ln", **options) -> Any:
    return opt_tf.TFOPTForCausalLM.from_pretrained(folder(variant), **options)


def python(
    code: str, backend: str | None, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program in another process, in the project's folder."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)} | environment
    environment.pop("KERAS_BACKEND", None)
    if backend is not None:
        environment["KERAS_BACKEND"] = backend
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
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
    named: Any = {"input_ids": ids, "labels": ids}
    for data in (
        (ids,),
        ({"input_ids": ids},),
        ({"input_ids": ids, "attention_mask": np.ones_like(ids)},),
        ({"input_ids": ids, "labels": ids},),
        (ids, ids),
        (tf.data.Dataset.from_tensor_slices(ids).batch(4),),
        (tf.data.Dataset.from_tensor_slices(named).batch(4),),
    ):
        model = model_of(folder, QUIET)
        model.compile(optimizer=keras.optimizers.Adam(1e-3), run_eagerly=len(histories) > 0)
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
    model: Any = opt_tf.TFOPTForSequenceClassification.from_pretrained(folder(QUIET, head))
    model.compile(optimizer=keras.optimizers.Adam(1e-3), metrics=["accuracy"])
    history = history_of(model, ids, ids[:, 3] % 2)
    assert history["loss"][-1] < history["loss"][0]
    assert "accuracy" in history
    assert model.predict(ids, verbose=0).shape == (8, 2)
    with pytest.raises(InputError, match="expected labels among the inputs or as y"):
        history_of(model, ids)
    answers: Any = opt_tf.TFOPTForQuestionAnswering.from_pretrained(
        folder(QUIET, "question_answering")
    )
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
    plain: Any = opt_tf.TFOPTModel.from_pretrained(folder(QUIET, "none"))
    plain.compile(optimizer="adam")
    with pytest.raises(InputError, match="TFOPTModel has no loss of its own"):
        history_of(plain, ids)


def test_predict_gives_the_logits(folder):
    model, ids = model_of(folder), make_prompts(CONFIGS["pre_ln"], 5, 9)
    logits = model.predict(ids, batch_size=2, verbose=0)
    assert isinstance(logits, np.ndarray)
    np.testing.assert_allclose(logits, model(ids).logits, rtol=0, atol=2e-5)
    answers: Any = opt_tf.TFOPTForQuestionAnswering(QUIET)
    assert [x.shape for x in answers.predict(ids, verbose=0)] == [(5, 9)] * 2


def test_our_optimizer_trains_in_keras_as_in_fit(folder):
    """One epoch of Keras' fit is `training.fit`: the same optimizer, clipping and decay."""
    # An epsilon above the gradients' rounding noise, of which AdamW would make steps.
    config = TrainConfig(
        max_steps=3, learning_rate=1e-3, lr_schedule="constant", max_grad_norm=0.5,
        adam_epsilon=1e-6,
    )  # fmt: skip
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
    kernel: Any = model.score.kernel
    assert kernel.shape == (32, 5)
    assert 0 < np.std(kernel.numpy()) < 0.1


@pytest.mark.parametrize("variant", [*CONFIGS, "untied"])
def test_keras_files_keep_everything(folder, variant, tmp_path):
    config = CONFIGS.get(variant) or CONFIGS["pre_ln"].replace(tie_word_embeddings=False)
    model, ids = model_of(folder, config, attn_implementation="eager"), make_prompts(config, 2, 9)
    model.generation_config = model.generation_config.replace(eos_token_id=(5, 6), max_length=30)
    expected = model(ids).logits
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(ids).logits, expected)
    assert loaded.config == model.config
    assert loaded.generation_config == model.generation_config
    assert loaded.attn_implementation == "eager"
    model.save_weights(tmp_path / "model.weights.h5")
    other: Any = opt_tf.TFOPTForCausalLM(config, seed=5)
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other(ids).logits, expected, rtol=0, atol=2e-5)


def test_a_trained_model_goes_on_where_it_was_saved(folder, tmp_path):
    """The optimizer's state and rules travel in the .keras file."""
    ids = make_prompts(QUIET, 8, 9)
    model = model_of(folder, QUIET)
    model.compile(optimizer=training.make_optimizer(model, TrainConfig(learning_rate=1e-3)))
    model.fit(ids, batch_size=4, verbose=0, shuffle=False)
    model.save(tmp_path / "model.keras")
    loaded: Any = keras.models.load_model(tmp_path / "model.keras")
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


COUNT = """
    import sys
    from pathlib import Path
    import opt_tf
    from tests.configs import CONFIGS
    from tests.reference import make_mask, make_prompts
    model = opt_tf.TFOPTForCausalLM(CONFIGS["pre_ln"])
    def report():
        print(len(list(Path(sys.argv[1]).glob("*before_optimizations.txt"))))
    settings = {
        "eos_token_id": None, "do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 2, "bad_words_ids": [[3, 4]], "max_new_tokens": 40,
    }
    for length, changes in (
        (5, {"seed": 1, "temperature": 0.7}),
        (9, {"seed": 2, "temperature": 1.3, "top_p": 0.5}),
        (30, {"temperature": 0.5, "repetition_penalty": 1.4, "max_new_tokens": 33}),
        (12, {"temperature": 0.6, "attention_mask": make_mask("left", [12, 4])}),
    ):
        model.generate(make_prompts(model.config, 2, length), **settings | changes)
    report()
    for length in (5, 9):
        list(model.stream(make_prompts(model.config, 2, length), **settings, temperature=length))
    report()
    for length in (5, 9):
        prompts = make_prompts(model.config, 2, length)
        model.generate(prompts, max_new_tokens=length, num_beams=3, length_penalty=length / 8)
    report()
    model.generate(make_prompts(model.config, 3, 5), **settings, temperature=2.0)
    report()
"""


def test_another_prompt_or_setting_compiles_nothing(tmp_path):
    """XLA writes down each program it compiles: first tokens, other tokens; per kind and shape."""
    result = python(COUNT, "tensorflow", str(tmp_path), XLA_FLAGS=f"--xla_dump_to={tmp_path}")
    assert result.stdout.split() == ["2", "3", "5", "7"], result.stderr


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
    first: Any = run(tf.constant(ids[:, :4]), model.init_cache(2, 8))
    assert isinstance(first, opt_tf.TFOPTOutput)
    cache: Any = first.past_key_values
    assert cache.length == 4
    second = run(tf.constant(ids[:, 4:]), cache)
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


# Several devices and processes.


FIT = """
    import contextlib, json, os, sys
    import tensorflow as tf
    kind, rank, ports, dropout = sys.argv[1], int(sys.argv[2]), sys.argv[3:5], float(sys.argv[5])
    if kind == "mirrored":
        devices = [tf.config.LogicalDeviceConfiguration()] * 2
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, devices)
    import opt_tf
    scope = contextlib.nullcontext()
    if kind == "mirrored":
        scope = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()
    elif kind == "workers":
        workers = [f"127.0.0.1:{port}" for port in ports]
        task = {"cluster": {"worker": workers}, "task": {"type": "worker", "index": rank}}
        os.environ["TF_CONFIG"] = json.dumps(task)
        scope = tf.distribute.MultiWorkerMirroredStrategy().scope()
    from opt_core import TrainConfig
    from opt_tf.training import make_optimizer
    from tests.configs import CONFIGS
    from tests.reference import make_prompts
    config = CONFIGS["pre_ln"].replace(dropout=dropout)
    with scope:
        model = opt_tf.TFOPTForCausalLM(config, seed=1)
        settings = TrainConfig(learning_rate=1e-3, max_grad_norm=0.1)
        model.compile(optimizer=make_optimizer(model, settings))
    options = tf.data.Options()
    policy = tf.data.experimental.AutoShardPolicy.DATA
    options.experimental_distribute.auto_shard_policy = policy
    ids = make_prompts(config, 8, 12)
    data = tf.data.Dataset.from_tensor_slices(ids).batch(4).with_options(options)
    losses = model.fit(data, epochs=3, verbose=0).history["loss"]
    print(json.dumps([*losses, float(model.evaluate(data, verbose=0))]))
"""


def fit_elsewhere(kind: str, dropout: float = 0.0, processes: int = 1) -> list[list[float]]:
    """The losses that each process of a training sees."""
    ports = []
    for _ in range(2):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            ports.append(str(listener.getsockname()[1]))
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(FIT), kind, str(rank), *ports, str(dropout)],
            cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    results = []
    for process in started:
        try:
            out, err = process.communicate(timeout=180)
        finally:
            process.kill()
        assert process.returncode == 0, err[-2000:]
        results.append(json.loads(out.splitlines()[-1]))
    return results


@pytest.mark.slow
def test_replicas_and_workers_see_the_losses_of_one_process():
    """Gradients are clipped over all of them together, which Keras alone does not do."""
    (alone,) = fit_elsewhere("one")
    assert alone[-1] < alone[0] - 0.1
    (mirrored,) = fit_elsewhere("mirrored")
    np.testing.assert_allclose(mirrored, alone, rtol=1e-5)
    for losses in fit_elsewhere("workers", processes=2):
        np.testing.assert_allclose(losses, alone, rtol=1e-5)


@pytest.mark.slow
def test_replicas_drop_values_of_their_own():
    (losses,) = fit_elsewhere("mirrored", dropout=0.1)
    assert losses[-1] < losses[0] - 0.1


# Export.


EXPORTS = {
    "greedy": {"eos_token_id": EOS},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": EOS},
    "filters": {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [8, 9]],
        "min_new_tokens": 3, "eos_token_id": EOS,
    },
}  # fmt: skip

SERVE = """
    import sys
    class Blocked:
        def find_spec(self, name, *_):
            if name.partition(".")[0] in ("opt_tf", "opt_core"):
                raise ImportError(f"{name} is not to be needed here")
    sys.meta_path.insert(0, Blocked())
    import numpy as np, tensorflow as tf
    loaded, data = tf.saved_model.load(sys.argv[1]), np.load(sys.argv[2])
    out = {}
    for i in range(int(data["count"])):
        inputs = {
            "input_ids": tf.constant(data[f"ids{i}"]),
            "attention_mask": tf.constant(data[f"mask{i}"]),
        }
        out[f"logits{i}"] = loaded.signatures["forward"](**inputs)["logits"]
        if data["seeded"]:
            inputs["seed"] = tf.constant(3, tf.int64)
        out[f"ids{i}"] = loaded.signatures["generate"](**inputs)["sequences"]
    np.savez(sys.argv[3], **out)
"""


@pytest.mark.parametrize("case", EXPORTS)
def test_an_exported_model_needs_nothing_of_ours(folder, case, tmp_path):
    model, settings = (
        model_of(folder),
        {"max_new_tokens": 10, "eos_token_id": None, **EXPORTS[case]},
    )
    export_saved_model(model, tmp_path / "saved", max_prompt=20, **settings)
    prompts = {}
    for i, lengths in enumerate(([7, 3], [20, 1, 9])):
        mask = make_mask("left", lengths).astype(np.int32)
        prompts[f"ids{i}"] = make_prompts(model.config, *mask.shape).astype(np.int32)
        prompts[f"mask{i}"] = mask
    np.savez(tmp_path / "in.npz", count=2, seeded="do_sample" in settings, **prompts)
    files = [str(tmp_path / name) for name in ("saved", "in.npz", "out.npz")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SERVE), *files],
        cwd=tmp_path, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    out = np.load(tmp_path / "out.npz")
    for i in range(2):
        ids, mask = prompts[f"ids{i}"], prompts[f"mask{i}"]
        ours = model.generate(ids, attention_mask=mask, seed=3, **settings)
        np.testing.assert_array_equal(out[f"ids{i}"], ours)
        logits = model(ids, attention_mask=mask).logits.numpy()
        seen = np.cumsum(mask, 1) > 0
        np.testing.assert_allclose(out[f"logits{i}"][seen], logits[seen], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", [case for case in EXPORTS if case != "sampling"])
def test_a_lite_model_has_built_in_operations_only(folder, case, tmp_path):
    """LiteRT's interpreter here has no others."""
    model = model_of(folder)
    settings = {"max_new_tokens": 10, "eos_token_id": None, **EXPORTS[case]}
    export_tflite(model, tmp_path / "model.tflite", max_prompt=20, **settings)
    lite = tf.lite.Interpreter(str(tmp_path / "model.tflite"))
    for lengths in ([7, 3], [20, 1, 9]):
        mask = make_mask("left", lengths).astype(np.int32)
        ids = make_prompts(model.config, *mask.shape).astype(np.int32)
        inputs = {"input_ids": ids, "attention_mask": mask}
        out = lite.get_signature_runner("generate")(**inputs)["sequences"]
        np.testing.assert_array_equal(out, model.generate(**inputs, **settings))
        logits = lite.get_signature_runner("forward")(**inputs)["logits"]
        expected, seen = model(**inputs).logits.numpy(), np.cumsum(mask, 1) > 0
        np.testing.assert_allclose(logits[seen], expected[seen], rtol=0, atol=2e-5)
    with pytest.raises(GenerationError, match="do_sample=True cannot be exported to LiteRT"):
        export_tflite(model, tmp_path / "x", 9, max_new_tokens=3, do_sample=True)


def test_an_exported_model_refuses_what_it_cannot_take(folder, tmp_path):
    export_saved_model(model_of(folder), tmp_path, max_prompt=9, max_new_tokens=3)
    generate = tf.saved_model.load(tmp_path).signatures["generate"]
    ids = tf.constant(make_prompts(CONFIGS["pre_ln"], 2, 9), tf.int32)
    mask = tf.ones_like(ids)
    generate(input_ids=ids, attention_mask=mask)
    for bad_ids, bad_mask in (
        (tf.concat([ids, ids], 1), tf.concat([mask, mask], 1)),
        (ids + 95, mask),
        (ids - 9, mask),
        (ids, tf.constant(make_mask("right", [9, 5]), tf.int32)),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError):
            generate(input_ids=bad_ids, attention_mask=bad_mask)


EXPORT_ERRORS = {
    "no length": ({}, "max_new_tokens: an export needs it"),
    "stops": ({"max_new_tokens": 3, "stop_strings": "x"}, "stop_strings cannot be exported"),
    "too long": ({"max_new_tokens": 505}, "9 tokens and 505 new.*max_position_embeddings=512"),
}


@pytest.mark.parametrize("case", EXPORT_ERRORS)
def test_what_cannot_be_exported(folder, case, tmp_path):
    settings, message = EXPORT_ERRORS[case]
    with pytest.raises(GenerationError, match=message):
        export_saved_model(model_of(folder), tmp_path, max_prompt=9, **settings)
