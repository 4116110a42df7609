"""Calls and methods of `transformers`' TensorFlow models of 4.57, and of KerasHub's."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import keras
import tensorflow as tf

from opt_core import OPTTokenizer
from opt_core.errors import AbsentError, ArgumentError, ConfigError, UnsupportedError
from tests.support.reference import make_mask, make_prompts
from tests.support.tf_models import QUIET, model_of

IDS: Any = make_prompts(QUIET, 2, 6)
MASK: Any = make_mask("left", [6, 4])
FIELDS: dict[str, Any] = {
    "vocabulary_size": 3000, "num_layers": 1, "num_heads": 2, "hidden_dim": 8,
    "intermediate_dim": 8, "max_sequence_length": 24,
}  # fmt: skip
TEXTS = ["What say you?", "No."]


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return model_of(folder, QUIET)


def test_a_cache_in_the_second_place(model):
    whole = model(IDS, attention_mask=MASK).logits
    first = model(IDS[:, :4], attention_mask=MASK[:, :4])
    for past in (first.past_key_values, tuple(first.past_key_values)):
        found = model(IDS[:, 4:], past, MASK).logits
        np.testing.assert_allclose(found, whole[:, 4:], atol=1e-5)
    with pytest.raises(ArgumentError, match="the third input, without a second, is attention_mas"):
        model(IDS, None, MASK)


def test_a_loop_that_passes_what_is_none_so_far(model):
    def run(ids):
        past, found = None, []
        for place in range(3):
            out = model(ids[:, place : place + 1], past_key_values=past)
            past = out.past_key_values
            found.append(out.logits)
        return tf.concat(found, 1)

    ids, whole = tf.constant(IDS, tf.int32), model(IDS[:, :3]).logits
    for loop in (run, tf.function(run)):
        np.testing.assert_allclose(loop(ids), whole, atol=1e-5)
    assert model({"input_ids": IDS, "past_key_values": None}, training=True).get("past") is None


def test_inputs_in_a_loop_of_ones_own(model):
    out = model(IDS[:, :5])
    inputs = model.prepare_inputs_for_generation(
        IDS, past_key_values=out.past_key_values, use_cache=True
    )
    assert inputs["input_ids"].shape == (2, 1)
    np.testing.assert_allclose(model(**inputs).logits[:, 0], model(IDS).logits[:, -1], atol=1e-5)
    assert model.prepare_inputs_for_generation(IDS)["input_ids"] is IDS


def test_losses_and_masks_by_transformers_methods(model):
    out = model(IDS, labels=IDS)
    loss = model.hf_compute_loss(labels=IDS[:, 1:], logits=out.logits[:, :-1])
    assert float(loss) == pytest.approx(float(out.loss), abs=1e-6)
    heads: Any = opt_tf.TFOPTForSequenceClassification(QUIET)
    scored: Any = heads(IDS, labels=[0, 1])
    assert float(heads.hf_compute_loss([0, 1], scored.logits)) == pytest.approx(float(scored.loss))
    with pytest.raises(ConfigError, match="hf_compute_loss: TFOPTModel has no loss"):
        model.model.hf_compute_loss([0], out.logits)
    assert model.get_head_mask(None, 2) == [None, None]
    assert model.get_head_mask(tf.ones(4), 2).shape == (2, 1, 4, 1, 1)
    answers = opt_tf.TFOPTForQuestionAnswering(QUIET)
    assert answers.get_label_to_output_name_mapping()["end_positions"] == "end_logits"
    assert model.get_label_to_output_name_mapping() == {}
    assert model.get_output_layer_with_bias() is model.get_prefix_bias_name() is None
    assert (model.framework, model.supports_xla_generation) == ("tf", True)
    assert model.register_for_auto_class("TFAutoModel") is None
    assert model.model.decoder.layers[0] is model.model.decoder.blocks[0]
    for name in ("greedy_search", "beam_search", "sample", "contrastive_search", "set_bias"):
        with pytest.raises(UnsupportedError, match=f"TFOPTForCausalLM.{name} is not supported: "):
            getattr(model, name)(IDS)
    with pytest.raises(ArgumentError, match="TFOPTModel does not generate; load it as TFOPTForCau"):
        model.model.generate(IDS)
    with pytest.raises(ConfigError, match="save: Keras 3 has no save_format"):
        model.save("x", save_format="tf")


def test_predictions_have_names(model):
    expected = model(IDS).logits
    for found in (model.predict(IDS, verbose=0), model.predict_on_batch(IDS)):
        np.testing.assert_allclose(found, expected, atol=1e-5)
        assert found.logits.shape == found["logits"].shape == found.shape
        assert type(found.logits) is np.ndarray
        with pytest.raises(AbsentError, match="predict returns logits alone; call the model"):
            _ = found.hidden_states
    assert model.model.predict(IDS, verbose=0).last_hidden_state.shape == (2, 6, QUIET.embed_dim)
    spans = opt_tf.TFOPTForQuestionAnswering(QUIET).predict(IDS, verbose=0)
    assert spans.start_logits is spans[0] is spans["start_logits"]
    assert spans.end_logits.shape == (2, 6)


def test_seeds_of_two_numbers(model):
    options = {"max_new_tokens": 4, "do_sample": True, "eos_token_id": None}
    ids = tf.constant(IDS, tf.int32)
    drawn = {
        model.generate(ids, seed=seed, **options).numpy().tobytes()
        for seed in ([7, 1], (7, 1), tf.constant([7, 1]), np.array([7, 1]))
    }
    assert len(drawn) == 1
    traced = tf.function(model.generate)
    assert traced(ids, seed=[7, 1], **options).numpy().tobytes() in drawn
    fresh = {traced(ids, **options).numpy().tobytes() for _ in range(3)}
    assert len(fresh) > 1


@pytest.fixture(scope="module")
def preprocessor() -> Any:
    return opt_tf.OPTCausalLMPreprocessor(OPTTokenizer.from_pretrained("mini"), sequence_length=8)


def test_a_task_of_kerashub(preprocessor, tmp_path):
    backbone: Any = opt_tf.TFOPTModel(**FIELDS, dropout=0.0)
    assert {name: getattr(backbone, name) for name in FIELDS} == FIELDS
    task: Any = opt_tf.TFOPTForCausalLM(backbone=backbone, preprocessor=preprocessor)
    assert task.backbone is backbone
    inputs, labels, weights = preprocessor(TEXTS)
    logits = backbone(inputs) @ tf.transpose(backbone.get_input_embeddings().embeddings)
    np.testing.assert_allclose(task(inputs), logits, atol=1e-6)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    weighted: Any = loss(labels, logits, sample_weight=weights)
    expected = float(weighted)
    data = tf.data.Dataset.from_tensor_slices(TEXTS).batch(2)
    for given in (loss, None):
        task.compile("auto", given, weighted_metrics="auto", sampler="greedy", run_eagerly=True)
        found = [task.evaluate(inputs, labels, sample_weight=weights, verbose=0)]
        if given is not None:
            found += [task.evaluate(x, verbose=0) for x in (TEXTS, tf.constant(TEXTS), data)]
        assert np.ravel(found)[::2] == pytest.approx([expected] * len(found), abs=1e-5)
    task.save_to_preset(tmp_path)
    again: Any = opt_tf.TFOPTForCausalLM.from_preset(tmp_path, preprocessor=None)
    assert again.preprocessor is None
    np.testing.assert_allclose(again(inputs), logits, atol=1e-6)
    fresh: Any = opt_tf.TFOPTForCausalLM.from_preset(tmp_path, load_weights=False)
    assert isinstance(fresh.preprocessor, OPTTokenizer)
    with pytest.raises(ArgumentError, match="config: expected an OPTConfig, received none"):
        opt_tf.TFOPTModel()


def test_rows_are_filled_up(model):
    prompts = {"token_ids": np.zeros((2, 9), int), "padding_mask": np.zeros((2, 9), int)}
    for row, length in enumerate((3, 5)):
        prompts["token_ids"][row, :length] = IDS[row, :length]
        prompts["padding_mask"][row, :length] = 1
    made = model.generate(prompts, stop_token_ids=None)
    assert made["padding_mask"].all()
    for row, length in enumerate((3, 5)):
        alone = model.generate(IDS[row : row + 1, :length], max_length=9, eos_token_id=None)
        np.testing.assert_array_equal(made["token_ids"][row], alone[0])
    end = int(made["token_ids"][0, 4])
    ended = model.generate(prompts, stop_token_ids=[end])
    count = 3 + made["token_ids"][0, 3:].tolist().index(end) + 1
    assert ended["padding_mask"][0].sum() == count
    assert not ended["token_ids"][0, count:].any()


class GreedySampler:
    """Of KerasHub's name."""


class TopKSampler:
    """Of KerasHub's name and attributes."""

    def __init__(self, k: int):
        self.k, self.temperature = k, 0.5


def test_samplers_that_are_objects(folder):
    model = model_of(folder, QUIET)
    model.compile(sampler=TopKSampler(3))
    settings = model.generation_config
    assert (settings.do_sample, settings.top_k, settings.temperature) == (True, 3, 0.5)
    model.compile(sampler=GreedySampler())
    assert not model.generation_config.do_sample


def test_tensors_beside_other_options(model):
    heads = tf.ones((QUIET.num_hidden_layers, QUIET.num_attention_heads))
    whole = model(IDS, attention_mask=MASK).logits
    found = model(
        IDS, attention_mask=MASK, head_mask=heads, output_attentions=True, use_cache=True,
        token_type_ids=tf.zeros_like(IDS),
    )  # fmt: skip
    np.testing.assert_allclose(found.logits, whole, atol=1e-6)
    assert np.abs(model(IDS, head_mask=heads * 0.5, use_cache=True).logits - whole).max() > 1e-4
    assert len(found.attentions) == QUIET.num_hidden_layers


def test_what_keras_two_and_pytorch_have_is_refused(model, tmp_path):
    for path in ("model.h5", "ckpt"):
        with pytest.raises(ConfigError, match=rf"save_weights: .* received '.*{path}'; name it so"):
            model.save_weights(tmp_path / path)
        with pytest.raises(ConfigError, match="load_weights: Keras 3 has weights in files named"):
            model.load_weights(tmp_path / path)
    for name in ("to", "cuda", "half", "eval", "call_with_cache", "generate_function"):
        assert not hasattr(model, name)
        with pytest.raises(AbsentError, match=rf"TFOPTForCausalLM\.{name} is not supported: \w+"):
            getattr(model, name)
    with pytest.raises(AbsentError, match=r"Linear\.kernel is not supported: use weight, which is"):
        model.model.decoder.layers[0].fc1.kernel  # noqa: B018
    with pytest.raises(
        UnsupportedError, match=r"from_keras_model is not supported: use model\.exp"
    ):
        tf.lite.TFLiteConverter.from_keras_model(model).convert()


def test_a_backbone_of_kerashub_in_a_functional_model():
    backbone: Any = opt_tf.TFOPTModel(**FIELDS, dropout=0.0)
    inputs = {"token_ids": IDS[:, :4], "padding_mask": np.ones((2, 4), np.int32)}
    hidden = backbone(inputs)
    assert tuple(backbone.output.shape) == (None, None, 8)
    assert tuple(backbone.compute_output_spec(inputs).shape) == (2, 4, 8)
    scores = keras.Model(backbone.input, keras.layers.Dense(2)(backbone.output[:, 0]))
    assert scores(inputs).shape == (2, 2)
    embedding = backbone.token_embedding
    np.testing.assert_allclose(
        embedding(hidden, reverse=True), hidden @ tf.transpose(embedding.embeddings), atol=1e-6
    )
    np.testing.assert_array_equal(embedding(IDS), backbone.get_input_embeddings()(tf.constant(IDS)))
    assert backbone.get_layer("transformer_layer_0") is backbone.decoder.layers[0]
    assert backbone.dropout == 0


def test_a_task_of_kerashub_compiles_itself(preprocessor):
    def task(**options: Any) -> Any:
        return opt_tf.TFOPTForCausalLM(**FIELDS, preprocessor=preprocessor, **options)

    made = task()
    tf.config.run_functions_eagerly(True)
    try:
        made.fit(TEXTS, verbose=0)
    finally:
        tf.config.run_functions_eagerly(False)
    assert float(made.optimizer.learning_rate) == pytest.approx(2e-5)
    for other in (task(compile=False), opt_tf.TFOPTForCausalLM(**FIELDS)):
        with pytest.raises(ValueError, match="You must call `compile"):
            other.evaluate(IDS)


def test_a_loss_by_the_outputs_name(model):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss={"logits": loss}, run_eagerly=True)
    found = model.evaluate(IDS, {"logits": IDS}, verbose=0)
    assert found == pytest.approx(float(loss(IDS, model(IDS).logits)), abs=1e-5)  # pyright: ignore[reportArgumentType]
