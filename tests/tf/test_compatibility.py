"""Methods that users of `transformers`' TensorFlow models and of KerasHub call."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import opt_tf  # isort: skip  it chooses Keras' backend
import keras
import tensorflow as tf

from opt_core import OPTTokenizer
from opt_core.errors import ConfigError, DataError, InputError
from tests.support.reference import make_mask, make_prompts, reference, tensors
from tests.support.tf_models import QUIET, model_of

SMALL = QUIET.replace(num_hidden_layers=1)
IDS, MASK = make_prompts(SMALL, 4, 7), make_mask("right", [7, 4, 7, 2])
LABELS = np.where(MASK, IDS, -100)


def compiled(model: Any, **options: Any) -> Any:
    model.compile("sgd", run_eagerly=True, **options)
    return model


def test_labels_are_found_wherever_they_are(folder):
    """Among the inputs, as y, as a dict y, with the loss of transformers."""
    theirs = reference(SMALL)
    given = tensors({"input_ids": IDS, "attention_mask": MASK, "labels": LABELS})
    expected = theirs(**given).loss.item()
    model = compiled(model_of(folder, SMALL), metrics=["sparse_categorical_accuracy"])
    x = {"input_ids": IDS, "attention_mask": MASK}
    for data in ((x | {"labels": LABELS},), (x, LABELS), (x, {"labels": LABELS}), (x,)):
        found = model.evaluate(*data, verbose=0, return_dict=True)
        assert found["loss"] == pytest.approx(expected, abs=1e-5), data
    compiled(model, loss="mse")
    for loss in ("passthrough", "auto"):  # recompiled, with transformers' word for it
        compiled(model, loss=loss)
        assert model.evaluate(x, LABELS, verbose=0) == pytest.approx(expected, abs=1e-5)
    with pytest.raises(InputError, match=r"y: expected a dict with labels or .*, received label"):
        model.evaluate(x, {"label": LABELS}, verbose=0)
    before = model.evaluate(x, LABELS, verbose=0)
    assert model.train_on_batch(x, LABELS) == pytest.approx(before, abs=1e-5)
    assert model.evaluate(x, LABELS, verbose=0) < before


def test_weights_of_samples_are_factors(folder):
    model = compiled(model_of(folder, SMALL))
    x = {"input_ids": IDS, "attention_mask": MASK}

    def loss(weights: Any, **options: Any) -> float:
        return model.evaluate(x, LABELS, sample_weight=weights, verbose=0, **options)

    plain = model.evaluate(x, LABELS, verbose=0)
    assert loss(np.full(4, 0.5)) == pytest.approx(plain / 2, abs=1e-5)
    assert loss(np.ones((4, 7))) == pytest.approx(plain, abs=1e-5)
    kept = np.array([1, 0, 1, 0])
    two = model.evaluate({k: v[::2] for k, v in x.items()}, LABELS[::2], verbose=0)
    assert loss(kept) == pytest.approx(two * 12 / 16, abs=1e-5)  # of 16 labels, 12 count
    heads = opt_tf.TFOPTForSequenceClassification.from_pretrained(
        folder(SMALL, "sequence_classification")
    )
    classes = np.array([0, 1, 1, 0])
    compiled(heads)
    one = heads.evaluate(IDS[:1], classes[:1], verbose=0)
    only = heads.evaluate(IDS, classes, sample_weight=np.array([1, 0, 0, 0]), verbose=0)
    assert only == pytest.approx(one / 4, abs=1e-5)
    answers = compiled(opt_tf.TFOPTForQuestionAnswering(SMALL))
    with pytest.raises(InputError, match="sample_weight: expected a loss given to compile"):
        answers.evaluate(IDS, (classes, classes), sample_weight=np.ones(4), verbose=0)
    positions = {"start_positions": classes, "end_positions": classes}
    assert answers.evaluate(IDS, positions, verbose=0) == pytest.approx(
        answers.evaluate({"input_ids": IDS, **positions}, verbose=0), abs=1e-5
    )


def test_inputs_come_as_a_tuple_a_list_or_a_dict(folder):
    model = model_of(folder, SMALL)
    expected = model(IDS, attention_mask=MASK).logits
    for given in (
        (IDS, MASK),
        [tf.constant(IDS), MASK],
        {"input_ids": IDS, "attention_mask": MASK},
    ):
        np.testing.assert_array_equal(model(given).logits, expected)
    np.testing.assert_array_equal(model([[2, 5, 6]]).logits, model(np.array([[2, 5, 6]])).logits)


def test_specs_under_a_policy():
    model = opt_tf.TFOPTModel(SMALL, dtype="mixed_bfloat16")
    for given in (
        IDS,
        {"input_ids": IDS, "attention_mask": MASK},
        keras.KerasTensor((4, 7), "int32"),
    ):
        spec = model.compute_output_spec(given).last_hidden_state
        assert (spec.shape, spec.dtype) == ((4, 7, 32), "bfloat16")


def test_a_model_is_made_of_a_configuration():
    for config in (SMALL, SMALL.to_dict(), opt_tf.TFOPTModel(SMALL).get_config()):
        assert opt_tf.TFOPTModel.from_config(config).config == SMALL


def test_programs_for_serving(folder, tmp_path):
    model = model_of(folder, SMALL)
    x = {"input_ids": tf.constant(IDS, tf.int32), "attention_mask": tf.constant(MASK, tf.int32)}
    expected = model(x).logits
    assert list(model.input_signature) == ["input_ids", "attention_mask"]
    np.testing.assert_allclose(model.eager_serving(x)["logits"], expected, atol=1e-5)
    assert model.serving.input_signature == (model.input_signature,)
    output = model.serving_output(model(IDS, output_hidden_states=True))
    assert output["hidden_states"].shape == (2, 4, 7, 32)
    model.export(tmp_path / "keras", verbose=False)  # before any call, or after
    served = tf.saved_model.load(tmp_path / "keras")
    np.testing.assert_allclose(served.serve(x)["logits"], expected, atol=1e-5)

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.int32, "ids")])
    def count(ids: Any) -> Any:
        return {"count": tf.size(ids)}

    model.save_pretrained(tmp_path / "all", saved_model=True, signatures={"count": count})
    loaded = tf.saved_model.load(tmp_path / "all" / "saved_model" / "1")
    assert loaded.signatures["count"](ids=tf.constant([1, 2]))["count"] == 2
    with pytest.raises(ConfigError, match="format: expected tf_saved_model or litert, received 'o"):
        model.export(tmp_path / "x", format="onnx")


class Rows:
    """As much of Hugging Face's datasets as is needed."""

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number]


def test_datasets_are_batched(folder):
    model = model_of(folder, SMALL)
    lengths = [7, 4, 7, 2, 5]
    rows = [{"input_ids": list(range(3, 3 + n)), "idx": n} for n in lengths]
    data = model.prepare_tf_dataset(Rows(rows), batch_size=2, shuffle=False, drop_remainder=False)
    assert len(data) == 3
    first, *_, last = data.as_numpy_iterator()
    np.testing.assert_array_equal(first["input_ids"][1], [3, 4, 5, 6, 1, 1, 1])
    np.testing.assert_array_equal(first["attention_mask"].sum(1), [7, 4])
    assert set(first) == {"input_ids", "attention_mask"}
    assert last["input_ids"].shape == (1, 5)
    labelled = [row | {"labels": row["input_ids"]} for row in rows]
    shuffled = model.prepare_tf_dataset(labelled, batch_size=2)
    assert len(shuffled) == 2  # the odd one is left out
    x, y = next(iter(shuffled))
    compiled(model)
    assert model.train_on_batch(x, y) > 0
    assert np.isfinite(model.fit(shuffled, epochs=2, verbose=0).history["loss"]).all()
    kept = [set(np.unique(x["input_ids"])) for x, _ in shuffled.as_numpy_iterator()]
    assert len(kept) == 2
    collated = model.prepare_tf_dataset(
        rows, 5, False, collate_fn=lambda rows, width: {
            "input_ids": [row["input_ids"][:width] for row in rows]
        }, collate_fn_args={"width": 2},
    )  # fmt: skip
    assert next(iter(collated))["input_ids"].shape == (5, 2)
    heads = opt_tf.TFOPTForSequenceClassification(SMALL)
    _, y = next(iter(heads.prepare_tf_dataset([{"input_ids": [3, 4], "label": 1}], 1)))
    assert y.numpy().tolist() == [1]
    for bad, message in (
        ([], "expected rows that are mappings, received list"),
        ([3], "expected rows that are mappings, received int"),
        ([{"idx": 1}], "expected columns such as input_ids, received idx"),
    ):
        with pytest.raises(DataError, match=f"dataset: {message}"):
            model.prepare_tf_dataset(bad)


def test_kerashubs_spellings(texts, monkeypatch):
    path, _ = texts
    model = opt_tf.TFOPTForCausalLM.from_preset(path)
    assert isinstance(model.preprocessor, OPTTokenizer)
    assert model.backbone is model.model
    calls = []
    monkeypatch.setattr(
        "opt_core.generation.mixin.GenerationMixin.generate",
        lambda self, input_ids, **options: calls.append(options) or input_ids,
    )
    assert model.generate("hello there") == "hello there"
    assert model.generate(["hello there", "you"], stop_token_ids=None) == ["hello there", "you"]
    assert calls[1]["eos_token_id"] is None
    np.testing.assert_array_equal(calls[1]["attention_mask"][1, :1], [0])
    sentences = ["hello there", "you"]
    compiled(model, sampler="beam")
    assert model.generation_config.num_beams == 5
    compiled(model, sampler="greedy")
    assert (model.generation_config.num_beams, model.generation_config.do_sample) == (1, False)
    with pytest.raises(ConfigError, match=r"sampler: expected one of greedy, .* received 'contra"):
        model.compile(sampler="contrastive")
    data = tf.data.Dataset.from_tensor_slices(sentences).batch(2)
    losses = [model.evaluate(x, verbose=0) for x in (sentences, np.array(sentences), data)]
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-5)
    assert model.predict(sentences, verbose=0).shape[0] == 2
    model.preprocessor = None
    with pytest.raises(InputError, match="texts need a tokenizer"):
        model.fit(sentences)


def test_adapters_and_quantised_weights_in_place(folder):
    model = model_of(folder, SMALL)
    model.enable_lora(2)
    assert {v.path.split("/")[-2] for v in model.trainable_variables} == {"lora_A", "lora_B"}
    assert model.num_parameters(only_trainable=True) == 0
    model, loaded = model_of(folder, SMALL), model_of(folder, SMALL, quantize="int8")
    model.quantize("int8")
    np.testing.assert_array_equal(model(IDS).logits, loaded(IDS).logits)
    with pytest.raises(ConfigError, match='quantize: expected "int8", "int4" or None'):
        model.quantize("float8")
